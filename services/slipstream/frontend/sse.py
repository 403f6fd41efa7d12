"""Server-sent events: framing, keep-alive comments, and an end for readers that stand still."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

import msgspec
from aiohttp import web

from slipstream.errors import ERRORS, Problem
from slipstream.frontend.http_metrics import LEFT, STATUS, HttpMetrics
from slipstream.frontend.problems import ApiError, error_json

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_encode = msgspec.json.Encoder().encode


def event(value: msgspec.Struct) -> bytes:
    return b"data: %b\n\n" % _encode(value)


def named_event(value: msgspec.Struct) -> bytes:
    """Under the name that is the struct's tag."""
    name = str(value.__struct_config__.tag).encode()
    return b"event: %b\ndata: %b\n\n" % (name, _encode(value))


class Manner(NamedTuple):
    """How an API ends its streams."""

    end: bytes
    error: Callable[[Problem], bytes]


CHAT = Manner(DONE, lambda problem: b"data: %b\n\n" % error_json(problem))


class _EventStream(web.StreamResponse):
    _send_headers_immediately = False
    """They go out with what is written first, which follows at once."""


class _Writer:
    """One open response. Says when it last wrote, and whether a write hangs."""

    __slots__ = ("_comment", "_response", "last_write_s", "transport", "writing_since_s")

    def __init__(self, response: web.StreamResponse, transport: asyncio.Transport | None) -> None:
        self._response = response
        self._comment: asyncio.Task[None] | None = None
        self.transport = transport
        self.last_write_s = time.monotonic()
        self.writing_since_s: float | None = None

    async def write(self, data: bytes) -> None:
        self.writing_since_s = self.last_write_s = time.monotonic()
        await self._response.write(data)
        self.writing_since_s = None

    async def end(self, data: bytes) -> None:
        self.writing_since_s = time.monotonic()
        await self._response.write_eof(data)
        self.writing_since_s = None

    def comment(self) -> None:
        if self._comment is None or self._comment.done():
            self._comment = asyncio.create_task(self._write_comment())

    async def _write_comment(self) -> None:
        with contextlib.suppress(ConnectionError):  # the handler is told as well
            await self.write(COMMENT)

    def close(self) -> None:
        if self._comment is not None:
            self._comment.cancel()


class StreamKeeper:
    """Watches all open streams from one task, so that no token pays for a timer."""

    def __init__(self, keep_alive_s: float, stall_s: float, http: HttpMetrics) -> None:
        self.keep_alive_s = keep_alive_s
        self._http = http
        self._stall_s = stall_s
        self._writers: set[_Writer] = set()

    @contextlib.contextmanager
    def watching(self, writer: _Writer) -> Iterator[_Writer]:
        self._writers.add(writer)
        try:
            yield writer
        finally:
            self._writers.discard(writer)
            writer.close()

    async def run(self) -> None:
        """Until cancelled."""
        period_s = min(1.0, self.keep_alive_s / 4, self._stall_s / 4)
        while True:
            await asyncio.sleep(period_s)
            now_s = time.monotonic()
            for writer in tuple(self._writers):
                self._look_after(writer, now_s)

    def _look_after(self, writer: _Writer, now_s: float) -> None:
        if writer.writing_since_s is None:
            if now_s - writer.last_write_s >= self.keep_alive_s:
                writer.comment()
        elif now_s - writer.writing_since_s > self._stall_s and writer.transport is not None:
            # Closing would wait until the reader has read; this ends the handler too.
            writer.transport.abort()
            self._writers.discard(writer)
            self._http.slow_readers_cut += 1


async def stream_events(
    request: web.Request,
    events: AsyncIterator[bytes],
    keeper: StreamKeeper,
    headers: Callable[[], dict[str, str]],
    manner: Manner = CHAT,
) -> web.StreamResponse:
    """Send `events`, which are whole and framed, then the end that is the API's manner.

    An ApiError before the first event leaves as such, to become an HTTP status; a later one is sent
    inside the stream. Headers go out with the first event, or when keep-alives must begin, and
    `headers` are asked for then.
    """
    first = asyncio.ensure_future(anext(events, None))
    try:
        await asyncio.wait({first}, timeout=keeper.keep_alive_s)
        if first.done():
            first.result()
        response = _EventStream(headers={**_HEADERS, **headers()})
        try:
            await response.prepare(request)
            with keeper.watching(_Writer(response, request.transport)) as writer:
                await _send_all(writer, first, events, request, manner)
        except ConnectionResetError:  # the client is gone: nobody to tell
            request[STATUS] = LEFT
        return response
    finally:
        if not first.done():
            # The iterator cannot be closed while somebody still waits for its next item.
            first.cancel()
            await asyncio.wait({first})


async def _send_all(
    writer: _Writer,
    first: "asyncio.Future[bytes | None]",
    events: AsyncIterator[bytes],
    request: web.Request,
    manner: Manner,
) -> None:
    if not first.done():
        await writer.write(COMMENT)
    try:
        data = await first
        while data is not None:
            await writer.write(data)
            data = await anext(events, None)
    except ApiError as error:
        request[STATUS] = ERRORS[error.problem.code].status
        await writer.write(manner.error(error.problem))
    await writer.end(manner.end)
