"""Asks a server over HTTP. Everything ends in time: what is said in one line is an ApiError."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import aiohttp
import msgspec

from slipstream.client.stream import AnswerError, Choice, Meter, short
from slipstream.config import did_you_mean
from slipstream.errors import ErrorCode

OK = 200
ASK_TIMEOUT_S = 5.0
"""For what a server knows without computing."""
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 300.0
"""Longest silence of a stream before it counts as broken off. Ours never is for more than 10 s."""
RESUMES_MAX = 16
RESUME_AFTER_S = 0.5
"""Between two tries to go on; together less than a stream outlives its frontend."""
_CUT = "the answer was cut off before its end"
_REFUSAL_BYTES = 65_536

S = TypeVar("S")


class ApiError(AnswerError):
    """A refusal, with its HTTP status; 0: nobody answered."""

    def __init__(
        self, message: str, status: int = 0, code: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def is_passing(self) -> bool:
        return is_passing(self.status)


class Reply(NamedTuple):
    """A whole answer as it came."""

    status: int
    body: bytes
    request_id: str
    retry_after_s: float | None


def is_passing(status: int) -> bool:
    """The same request may have better luck in a moment. 0: nobody answered."""
    return status in (0, 409, 429) or status >= 500


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int = 0
    """0: the server does not say."""


class _Models(msgspec.Struct, frozen=True):
    data: list[ModelCard]


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | int | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: _Error


class Api:
    """A server. `url` is without `/v1`. A connection for each request: some servers end theirs
    behind an answer, unannounced, and a chat waits long between two."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url
        self.headers: dict[str, str] = {}
        """Of the latest stream's answer."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def model(self, name: str = "") -> ModelCard:
        """The one of this name, or the first that the server has."""
        cards = (await self.ask("/v1/models", _Models)).data
        for card in cards:
            if name in ("", card.id):
                return card
        names = [card.id for card in cards]
        wanted = f"has no model {name}{did_you_mean(name, names)}" if name else "has no model"
        there = ", ".join(names) or "none yet"
        raise ApiError(f"{self.url} {wanted}; there: {there}", 404, ErrorCode.MODEL_NOT_FOUND)

    async def ask(self, path: str, kind: type[S]) -> S:
        """A JSON answer."""
        raw = await self.read(path)
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.DecodeError:
            said = f"{self.url}{path} answers something else: {short(raw)}"
            raise ApiError(said, OK) from None

    async def read(self, path: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
        try:
            async with self._session.get(self.url + path, timeout=timeout) as reply:
                if reply.status != OK:
                    raise await _refused(reply)
                return await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._gone(error) from None

    async def post(self, path: str, body: Any, timeout_s: float) -> Reply:
        """A whole answer, good or bad. ApiError: there is none."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.post(self.url + path, json=body, timeout=timeout) as reply:
                raw = await reply.read()
                request_id = reply.headers.get("x-request-id", "")
                return Reply(reply.status, raw, request_id, _retry_after(reply))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._gone(error) from None

    async def stream(
        self, path: str, body: dict[str, Any], meter: Meter
    ) -> AsyncGenerator[list[Choice], None]:
        """The choices of a streamed answer as they come, also when the connection breaks and the
        server can go on where it did. AnswerError if it does not end well."""
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for _ in range(RESUMES_MAX):
            try:
                async for choices in self._stream(path, wanted, meter):
                    yield choices
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if not self.headers:
                    raise self._gone(error) from None
            except ApiError as error:
                if not meter.last_id:
                    raise
                if not error.is_passing:
                    break
            if meter.done:
                return
            if not meter.last_id:
                break
            await asyncio.sleep(RESUME_AFTER_S)
            meter.reconnected()
        raise AnswerError(_CUT)

    async def _stream(
        self, path: str, wanted: dict[str, Any], meter: Meter
    ) -> AsyncGenerator[list[Choice], None]:
        """Until the connection ends, however it does; from where the meter is."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S
        )
        headers = {"Accept": "text/event-stream"}
        if meter.last_id:
            headers["Last-Event-ID"] = meter.last_id
        if not meter.last_id:
            self.headers = {}
        async with self._session.post(
            self.url + path, json=wanted, timeout=timeout, headers=headers
        ) as reply:
            self.headers = dict(reply.headers)
            if reply.status != OK:
                raise await _refused(reply)
            async for data in reply.content.iter_any():
                yield meter.feed(data, time.perf_counter())

    def _gone(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            reason = "no answer in time"
        elif isinstance(error, aiohttp.ClientConnectorError):
            number = error.os_error.errno
            reason = os.strerror(number) if number else str(error.os_error)
        else:
            reason = str(error) or type(error).__name__
        return ApiError(f"{self.url}: {reason}")


async def _refused(reply: aiohttp.ClientResponse) -> ApiError:
    raw = await reply.content.read(_REFUSAL_BYTES)
    try:
        error = msgspec.json.decode(raw, type=_Refusal).error
    except msgspec.DecodeError:
        error = _Error(short(raw))
    text = " ".join(error.message.split()) or str(reply.reason)
    return ApiError(
        f"HTTP {reply.status}: {text}", reply.status, str(error.code or ""), _retry_after(reply)
    )


def _retry_after(reply: aiohttp.ClientResponse) -> float | None:
    """In seconds; a date in its place counts as not given."""
    word = reply.headers.get("Retry-After", "")
    return float(word) if word.isdigit() else None
