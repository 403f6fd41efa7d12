"""Responses that are kept, to be asked for and to be gone on from. Bounded in number, bytes and
time; what is gone is not found, and never waited for."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from slipstream.frontend.responses_shapes import ResponseBody

ENTRY_BYTES = 2048
"""What an entry takes beside its texts."""


class Kept(msgspec.Struct, frozen=True):
    """As JSON, because that is small and nobody changes it."""

    response: bytes
    input_items: bytes
    """Those of the request itself, with ids."""
    messages: bytes
    """The whole conversation, the answer included, without instructions."""

    @property
    def num_bytes(self) -> int:
        texts = len(self.response) + len(self.input_items) + len(self.messages)
        return texts + ENTRY_BYTES


def kept(
    body: ResponseBody, input_items: list[dict[str, Any]], messages: list[dict[str, Any]]
) -> Kept:
    encode = msgspec.json.encode
    return Kept(encode(body), encode(input_items), encode(messages))


class ResponseStore(Protocol):
    """Keeps responses by id. One that all frontends share would lie behind the same four."""

    async def keep(self, response_id: str, entry: Kept) -> bool:
        """False: it is larger than everything that is kept may be."""
        ...

    async def find(self, response_id: str) -> Kept | None: ...

    async def drop(self, response_id: str) -> bool:
        """Whether it was there."""
        ...

    def limits(self) -> str:
        """In words, for who asks for one that is gone."""
        ...


class OwnStore:
    """What one client has kept in a store that is everybody's: of the rest it knows nothing."""

    def __init__(self, store: ResponseStore, tenant: str) -> None:
        self._store, self._tenant = store, tenant

    async def keep(self, response_id: str, entry: Kept) -> bool:
        return await self._store.keep(f"{self._tenant}/{response_id}", entry)

    async def find(self, response_id: str) -> Kept | None:
        return await self._store.find(f"{self._tenant}/{response_id}")

    async def drop(self, response_id: str) -> bool:
        return await self._store.drop(f"{self._tenant}/{response_id}")

    def limits(self) -> str:
        return self._store.limits()


class MemoryStore:
    """Of this process. The oldest go first."""

    def __init__(
        self,
        max_bytes: int,
        keep_s: float,
        max_entries: int = 16_384,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes, self._keep_s, self._max_entries = max_bytes, keep_s, max_entries
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, Kept]] = OrderedDict()
        """With the time at which it goes, which is in order."""
        self.num_bytes = 0

    async def keep(self, response_id: str, entry: Kept) -> bool:
        if entry.num_bytes > self._max_bytes:
            return False
        await self.drop(response_id)
        self._entries[response_id] = self._clock() + self._keep_s, entry
        self.num_bytes += entry.num_bytes
        self._shrink()
        return True

    async def find(self, response_id: str) -> Kept | None:
        self._shrink()
        found = self._entries.get(response_id)
        return None if found is None else found[1]

    async def drop(self, response_id: str) -> bool:
        self._shrink()
        found = self._entries.pop(response_id, None)
        if found is not None:
            self.num_bytes -= found[1].num_bytes
        return found is not None

    def limits(self) -> str:
        return (
            f"The last {self._max_bytes >> 20} MiB of {self._keep_s:g} s are kept, by the frontend "
            "that made them"
        )

    def _shrink(self) -> None:
        now_s = self._clock()
        while self._entries:
            goes_s, entry = next(iter(self._entries.values()))
            full = self.num_bytes > self._max_bytes or len(self._entries) > self._max_entries
            if not full and now_s < goes_s:
                return
            self._entries.popitem(last=False)
            self.num_bytes -= entry.num_bytes
