"""The supervisor's end of `runtime.pulse`: a socket for one life of one child."""

import asyncio
import socket
from pathlib import Path

from slipstream.runtime.pulse import LOOK_S


class Listener(asyncio.DatagramProtocol):
    """Until its first word nothing is expected of a child: it loads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._transport: asyncio.DatagramTransport | None = None
        self._heard = False
        self._news = False

    async def __aenter__(self) -> "Listener":
        self.path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=str(self.path), family=socket.AF_UNIX
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._transport is not None:
            self._transport.close()
        self.path.unlink(missing_ok=True)

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._heard = self._news = True

    async def silence(self, watchdog_s: float) -> None:
        """Returns when a child that has spoken was silent for so long. Counts looks, not seconds:
        after a stop of this process what the child has said meanwhile is read first."""
        looks, idle = max(2, round(watchdog_s / LOOK_S)), 0
        while idle < looks:
            await asyncio.sleep(LOOK_S)
            idle = idle + 1 if self._heard and not self._news else 0
            self._news = False
