"""A journal store in memory, as Redis does it: refuses what is not above all that it has."""

import asyncio
from collections.abc import Sequence

from slipstream.frontend.journal import Append, Found, StoreError, Written


class Streams:
    """What is kept, and at once."""

    def __init__(self) -> None:
        self.streams: dict[str, tuple[bytes, list[tuple[tuple[int, int], bytes]]]] = {}

    def write(self, one: Append) -> Written:
        owner, number = map(int, one.entry_id.split("-"))
        if one.key not in self.streams and not one.head:
            return Written.GONE
        _, entries = self.streams.setdefault(one.key, (one.head, []))
        if entries and (owner, number) <= entries[-1][0]:
            return Written.FENCED
        entries.append(((owner, number), one.pack))
        return Written.DONE

    def read(self, key: str, head: bytes, owner: int) -> Found | None:
        if key not in self.streams or self.streams[key][0] != head:
            return None
        entries = self.streams[key][1]
        owner = max(owner, entries[-1][0][0] + 1)
        packs = [pack for _, pack in entries if pack]
        entries.append(((owner, 0), b""))
        return Found(owner, packs)

    def remove(self, key: str, owner: int) -> None:
        if key in self.streams and self.streams[key][1][-1][0][0] == owner:
            del self.streams[key]


class MemoryStore(Streams):
    """The same behind a wire that can be slow or cut."""

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.delay_s = 0.0
        self.writes = 0

    async def append(self, appends: Sequence[Append]) -> list[Written]:
        self.writes += 1
        await self._answers()
        return [self.write(one) for one in appends]

    async def take(self, key: str, head: bytes, owner: int) -> Found | None:
        await self._answers()
        return self.read(key, head, owner)

    async def drop(self, key: str, owner: int) -> None:
        self.remove(key, owner)

    async def close(self) -> None:
        pass

    async def _answers(self) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.down:
            raise StoreError("down")
