"""A client of streams that costs little: it counts events, and reads nothing else in them."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import cast

_OK = b"HTTP/1.1 200"
_EVENT = b"\ndata: "
_END = b"\r\n0\r\n\r\n"
"""Of a chunked body. No event looks like it, for each ends with an empty line of its own."""
_TAIL_BYTES = len(_END) - 1
assert len(_EVENT) == len(_END)


@dataclass(slots=True)
class Counted:
    """What all connections of a client have received so far."""

    events: int = 0


class Connection(asyncio.Protocol):
    """One kept connection that asks for one stream after another."""

    def __init__(self, counted: Counted) -> None:
        self.first_s = 0.0
        """When the latest stream's first event came, on the host's monotonic clock."""
        self.events = 0
        """Of the latest stream, its `[DONE]` too."""
        self._counted = counted
        self._tail = b""
        self._over: asyncio.Future[None] | None = None

    async def stream(self, request: bytes) -> float:
        """Returns when it was sent, after the answer's end. ConnectionError: it is no stream."""
        self._over = asyncio.get_running_loop().create_future()
        self.events, self._tail = 0, b""
        sent_s = time.monotonic()
        self._transport.write(request)
        await self._over
        return sent_s

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own

    def data_received(self, data: bytes) -> None:
        if not self._tail and not data.startswith(_OK):
            self._end(ConnectionError(data.decode("utf-8", "replace")))
        data = self._tail + data
        found = data.count(_EVENT)
        if found:
            if not self.events:
                self.first_s = time.monotonic()
            self.events += found
            self._counted.events += found
        if data.endswith(_END):
            self._end(None)
        self._tail = data[-_TAIL_BYTES:]

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("closed by the server"))

    def _end(self, error: Exception | None) -> None:
        if self._over is None or self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)


async def connect(port: int, counted: Counted) -> Connection:
    loop = asyncio.get_running_loop()
    _, made = await loop.create_connection(lambda: Connection(counted), "127.0.0.1", port)
    return made


def post(path: str, body: dict[str, object]) -> bytes:
    """A whole HTTP request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
