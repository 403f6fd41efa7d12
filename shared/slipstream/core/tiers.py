"""The tiers below the pool: host memory, then disk.

What has been hit often enough is copied down while it is still in the pool, so that nothing waits
for a copy when the pool needs the block. The store moves and drops blocks by itself and says so;
what is here is what it said last, and a load may find less.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

from slipstream.core.blocks import BlockPool
from slipstream.core.machine import BlockMove, Effect, SaveBlocks, SavedBlock
from slipstream.core.reporter import IndexReporter
from slipstream.types import BlockHash, BlockId

SAVING_MAX = 256
"""Blocks being copied at a time; more stay where they are, and are saved at another hit."""


class Tiers:
    """What lies below, and what is on its way there. Owns a reference on each block that is
    copied."""

    def __init__(self, pool: BlockPool, reporter: IndexReporter):
        self.pool, self.reporter = pool, reporter
        self.saving: dict[str, list[BlockId]] = {}
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
        """Copy down what became worth it since the last call."""
        wanted = []
        room = SAVING_MAX - sum(map(len, self.saving.values()))
        busy = set(chain.from_iterable(self.saving.values()))
        for block in dict.fromkeys(self.pool.drain_hot()[: max(0, room)]):
            named = self.pool.name_of(block)
            if named is None or block in busy:
                continue
            if self.reporter.tier_of(named.block_hash) is None:
                wanted.append(SavedBlock(block, *named, self.pool.digests[block]))
        if not wanted:
            return []
        self._ops += 1
        op_id = f"save/{self._ops}"
        blocks = self.saving[op_id] = [saved.block for saved in wanted]
        self.pool.take(blocks)
        return [SaveBlocks(op_id, tuple(wanted))]

    def saved(self, op_id: str) -> None:
        """Nobody reads these blocks any more."""
        self.pool.release(self.saving.pop(op_id))

    def moved(self, moved: Iterable[BlockMove]) -> None:
        self.reporter.moved(moved)
