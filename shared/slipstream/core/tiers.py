"""The tiers below the pool: host memory, then disk.

What has been hit often enough is copied down while it is still in the pool, so that nothing waits
for a copy when the pool needs the block. The store moves and drops blocks by itself and says so;
what is here is what it said last, and a load may find less.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from slipstream.core.blocks import BlockPool
from slipstream.core.machine import BlockMove, Effect, SaveBlocks, SavedBlock
from slipstream.core.reporter import IndexReporter
from slipstream.types import BlockHash, BlockId

SHARE = 8
"""At most one in so many blocks of the pool is copied at a time; others wait, and may be evicted
before their turn."""
BATCH = 16


class Tiers:
    """What lies below, and what is on its way there. Owns a reference on each block that is
    copied."""

    def __init__(self, pool: BlockPool, reporter: IndexReporter):
        self.pool, self.reporter = pool, reporter
        self.saving: dict[str, list[BlockId]] = {}
        self._wanted: OrderedDict[BlockId, None] = OrderedDict()
        self.blocks_loaded = 0
        self._ops = 0

    def run(self, hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """The leading ones that are there."""
        there = []
        for block_hash in hashes:
            if self.reporter.tier_of(block_hash) is None:
                break
            there.append(block_hash)
        return there

    def flush(self) -> list[Effect]:
        """Copy down what is worth it, as far as there is room for it on the way."""
        self._wanted.update(dict.fromkeys(self.pool.drain_hot()))
        effects: list[Effect] = []
        busy = sum(map(len, self.saving.values()))
        most = max(BATCH, self.pool.num_blocks // SHARE)
        while self._wanted and busy < most:
            batch = self._next(min(BATCH, most - busy))
            if batch:
                self._ops += 1
                op_id = f"save/{self._ops}"
                self.saving[op_id] = [saved.block for saved in batch]
                self.pool.take(self.saving[op_id])
                busy += len(batch)
                effects.append(SaveBlocks(op_id, tuple(batch)))
        return effects

    def _next(self, count: int) -> list[SavedBlock]:
        """Of those wanted the first ones that are still there and not below already."""
        batch: list[SavedBlock] = []
        while self._wanted and len(batch) < count:
            block, _ = self._wanted.popitem(last=False)
            named = self.pool.name_of(block)
            if named is not None and self.reporter.tier_of(named.block_hash) is None:
                batch.append(SavedBlock(block, *named, self.pool.digests[block]))
        return batch

    def saved(self, op_id: str) -> None:
        """Nobody reads these blocks any more."""
        self.pool.release(self.saving.pop(op_id))

    def moved(self, moved: Iterable[BlockMove]) -> None:
        self.reporter.moved(moved)
