"""A proxy that does to a connection what networks do: late, slow, in slices, silent, cut, reset.

In front of a TCP port, or in the place of a socket file: who connects to it from then on.
"""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

Address = tuple[str, int] | Path
CHUNK_BYTES = 65_536
_POLL_S = 0.02
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing says RST."""


class Proxy:
    """Its fields may change at any time, and count from the next bytes on."""

    def __init__(self, listen: Address, upstream: Address) -> None:
        """A port of 0 is chosen by the system: `port`."""
        self.latency_s = 0.0
        self.bytes_per_s = 0.0
        """0: as fast as it goes."""
        self.slice_bytes = CHUNK_BYTES
        self.silent_up = self.silent_down = False
        """Nothing passes and nothing is closed: half-open. `up`: towards the server."""
        self.bytes_passed = 0
        self._listen, self._upstream = listen, upstream
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        if isinstance(self._listen, Path):
            self._server = await asyncio.start_unix_server(self._serve, self._listen)
        else:
            self._server = await asyncio.start_server(self._serve, *self._listen)
            self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Ends all connections in order."""
        for writer in self._writers:
            writer.close()

    def reset(self) -> None:
        """Ends all connections by RST, of TCP."""
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if isinstance(self._upstream, Path):
                there = await asyncio.open_unix_connection(self._upstream)
            else:
                there = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.close()
            self._tasks.discard(task)
            return
        pair = {writer, there[1]}
        self._writers |= pair
        try:
            await asyncio.gather(
                self._pump(reader, there[1], up=True), self._pump(there[0], writer, up=False)
            )
        except asyncio.CancelledError:
            pass  # by our end alone; asyncio would print it as an error of the callback
        finally:
            for each in pair:
                each.close()
            self._writers -= pair
            self._tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                while self.silent_up if up else self.silent_down:  # noqa: ASYNC110 set by anyone
                    await asyncio.sleep(_POLL_S)
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                for at in range(0, len(data), self.slice_bytes):
                    piece = data[at : at + self.slice_bytes]
                    if self.bytes_per_s:
                        await asyncio.sleep(len(piece) / self.bytes_per_s)
                    writer.write(piece)
                    await writer.drain()
                    self.bytes_passed += len(piece)
            if writer.can_write_eof():
                writer.write_eof()
