"""The journal of streamed answers: written ahead of the client, read by the frontend that it comes
to when this one is gone.

Only a hint: what it lacks, tokenizers say again or workers compute. So it costs a client BUDGET_S
at most, and streams go on without it while the store is slow or away.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

from slipstream.core.submission import TAKEN
from slipstream.errors import Problem
from slipstream.frontend.gateway import StreamItem
from slipstream.frontend.replay import packed
from slipstream.messages import TextDelta
from slipstream.types import FinishReason

BUDGET_S = 0.05
"""For one write, of all streams together."""
TURNS = 3
"""Of the loop, which an answer may still take to be seen when the loop itself has stood still."""
TAKE_S = 1.0
RETRY_S = 2.0
"""How long nothing new is journaled after a write that failed."""
CALL_BYTES_MAX = 4 << 20
BYTES_MAX = 64 << 20
"""Of all that this frontend has journaled and the store has not dropped: the index lives there."""
ENTRY_BYTES = 64
"""Of an entry, beside what is in it."""


class StoreError(Exception):
    """The store does not answer, or not as it should."""


class Append(NamedTuple):
    key: str
    entry_id: str
    """`<owner>-<number>`: the store takes it only above all that it has, so that an earlier owner
    is refused."""
    head: bytes
    """Of the call, in its first entry; later ones want one to be there."""
    pack: bytes


class Written(Enum):
    DONE = 0
    GONE = 1
    """The store has dropped the beginning."""
    FENCED = 2
    """A later owner has written."""


class Found(NamedTuple):
    owner: int
    """The taker's own."""
    packs: Sequence[bytes]


class Store(Protocol):
    """Everything raises StoreError, and ends when it is cancelled."""

    async def append(self, appends: Sequence[Append]) -> list[Written]: ...

    async def take(self, key: str, head: bytes, owner: int) -> Found | None:
        """All that is there, in order, for an owner of this number, or of one that is above all
        others; from now on those are refused. None: there is nothing under this key, or another
        head."""
        ...

    async def drop(self, key: str, owner: int) -> None:
        """Unless a later owner has it."""
        ...

    async def close(self) -> None: ...


class Log:
    """The journal of one call, as its writer has it. Items come out at `put` when they are written,
    in their order."""

    def __init__(
        self,
        journal: "Journal",
        key: str,
        head: bytes,
        owner: int,
        put: Callable[[int, StreamItem], None],
    ) -> None:
        self._journal, self._head, self._put = journal, head, put
        self._number = self.num_bytes = self.waiting = 0
        self.key, self.owner = key, owner
        self.lost = self.fenced = False

    def append(self, choice: int, item: StreamItem) -> None:
        if self.lost and not self.waiting:
            self._put(choice, item)
        else:
            self.waiting += 1
            self._journal.enqueue(self, choice, item)

    def end(self, *, whole: bool) -> None:
        """The handler is done. A whole answer is kept, for a client that has lost its end."""
        self._journal.ended(self, whole=whole)

    def next_append(self, pack: bytes) -> Append:
        self._number += 1
        self.num_bytes += len(pack) + ENTRY_BYTES
        head, self._head = self._head, b""
        return Append(self.key, f"{self.owner}-{self._number}", head, pack)

    def written(self, items: Sequence[tuple[int, StreamItem]]) -> None:
        self.waiting -= len(items)
        for choice, item in items if not self.fenced else [(items[0][0], TAKEN)]:
            self._put(choice, item)


class Journal:
    """Of one frontend; lives on its loop. All streams of a turn of the loop are written at once."""

    def __init__(
        self, store: Store, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._ttl_s, self._clock = store, ttl_s, clock
        self._queue: dict[Log, list[tuple[int, StreamItem]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = False
        self._away_until_s = 0.0
        self._kept: deque[tuple[float, int]] = deque()
        """Of logs that have ended: until when the store has them, and their bytes."""
        self._bytes = 0
        self._counts: Counter[str] = Counter()

    def begin(
        self, key: str, head: bytes, owner: int, put: Callable[[int, StreamItem], None]
    ) -> Log | None:
        """None: this one goes without. `head`: empty if the journal is there already."""
        now_s = self._clock()
        while self._kept and self._kept[0][0] <= now_s:
            self._bytes -= self._kept.popleft()[1]
        if now_s < self._away_until_s or self._bytes >= BYTES_MAX:
            self._counts["journal_skipped"] += 1
            return None
        return Log(self, key, head, owner, put)

    async def take(self, key: str, head: bytes, owner: int) -> Found | None:
        try:
            async with asyncio.timeout(TAKE_S):
                found = await self._store.take(key, head, owner)
        except (StoreError, TimeoutError):
            self._failed()
            return None
        self._counts["journal_taken"] += found is not None
        return found

    def statistics(self) -> dict[str, float]:
        counts = {f"{name}_total": float(count) for name, count in self._counts.items()}
        return {"journal_bytes": float(self._bytes), **counts}

    async def close(self) -> None:
        await asyncio.gather(*self._tasks)
        await self._store.close()

    # --- For its logs ---

    def enqueue(self, log: Log, choice: int, item: StreamItem) -> None:
        self._queue.setdefault(log, []).append((choice, item))
        if not self._writing:
            self._writing = True
            self._keep(self._write_all())

    def ended(self, log: Log, *, whole: bool) -> None:
        if whole and not log.fenced:
            self._kept.append((self._clock() + self._ttl_s, log.num_bytes))
            return
        self._bytes -= log.num_bytes
        if log.num_bytes and self._clock() >= self._away_until_s:
            self._keep(self._drop(log))
        log.lost = True

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drop(self, log: Log) -> None:
        try:
            async with asyncio.timeout(TAKE_S):
                await self._store.drop(log.key, log.owner)
        except (StoreError, TimeoutError):
            self._failed()

    def _failed(self) -> None:
        self._counts["journal_failures"] += 1
        self._away_until_s = self._clock() + RETRY_S

    async def _write_all(self) -> None:
        try:
            while self._queue:
                queue, self._queue = self._queue, {}
                await self._write(queue)
                for log, items in queue.items():
                    log.written(items)
        finally:
            self._writing = False

    async def _write(self, queue: dict[Log, list[tuple[int, StreamItem]]]) -> None:
        """A log whose write failed is lost: what follows would not follow on anything."""
        logs, appends = [], []
        for log, items in queue.items():
            kept = [
                (c, item) for c, item in items if not isinstance(item, Problem) and _lasts(item)
            ]
            if log.lost or log.fenced or not kept:
                continue
            before = log.num_bytes
            append = log.next_append(packed(kept))
            self._bytes += log.num_bytes - before
            logs.append(log)
            appends.append(append)
        if not appends:
            return
        ends = await self._appended(appends)
        for log, end in zip(logs, ends, strict=True):
            self._counts["journal_entries"] += end is Written.DONE
            self._counts["journal_fenced"] += end is Written.FENCED
            log.fenced = end is Written.FENCED
            log.lost = end is not Written.DONE or log.num_bytes > CALL_BYTES_MAX

    async def _appended(self, appends: Sequence[Append]) -> list[Written]:
        writing = asyncio.ensure_future(self._store.append(appends))
        await asyncio.wait({writing}, timeout=BUDGET_S)
        for _ in range(TURNS):
            if not writing.done():
                await asyncio.sleep(0)
        if not writing.done():
            writing.cancel()
            await asyncio.wait({writing})
        if writing.cancelled() or writing.exception() is not None:
            self._failed()
            return [Written.GONE] * len(appends)
        return writing.result()


def _lasts(item: int | TextDelta) -> bool:
    """Failures are not kept: who asks again may have better luck."""
    return isinstance(item, int) or item.finish_reason is not FinishReason.ERROR
