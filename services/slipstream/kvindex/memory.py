"""The index store without Redis: what `RedisStore` does, in one process and at once.

For the simulator, and as the specification that the tests hold Redis against.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slipstream.core.machine import (
    Effect,
    Held,
    StoreAlive,
    StoreApply,
    StoreDone,
    StoreFind,
    StoreForget,
    StoreReplace,
)
from slipstream.types import BlockHash, Epoch, NodeId


@dataclass(slots=True)
class _Worker:
    epoch: Epoch
    seq: int
    tiers: dict[BlockHash, int]


@dataclass(slots=True)
class MemoryStore:
    workers: dict[NodeId, _Worker] = field(default_factory=dict)

    def apply(self, effect: Effect) -> StoreDone | None:
        """One store effect; None where nothing comes back."""
        match effect:
            case StoreApply():
                return self._apply(effect)
            case StoreReplace():
                self.workers[effect.worker] = _Worker(effect.epoch, effect.seq, _tiers(effect))
                return StoreDone(effect.op_id, ok=True)
            case StoreFind():
                return self._find(effect)
            case StoreAlive(op_id, worker, epoch, seq):
                return StoreDone(op_id, ok=True, gap=not self._is_at(worker, epoch, seq))
            case StoreForget(worker, epoch):
                if worker in self.workers and self.workers[worker].epoch == epoch:
                    del self.workers[worker]
                return None
        raise TypeError(f"a store does not execute {type(effect).__name__}")

    def lapse(self, worker: NodeId) -> None:
        """What the end of `PEXPIRE` does."""
        self.workers.pop(worker, None)

    def flush(self) -> None:
        self.workers.clear()

    def _is_at(self, worker: NodeId, epoch: Epoch, seq: int) -> bool:
        known = self.workers.get(worker)
        return known is not None and (known.epoch, known.seq) == (epoch, seq)

    def _apply(self, effect: StoreApply) -> StoreDone:
        if not self._is_at(effect.worker, effect.epoch, effect.seq - 1):
            return StoreDone(effect.op_id, ok=True, gap=True)
        known = self.workers[effect.worker]
        known.seq = effect.seq
        for block_hash in effect.removed:
            known.tiers.pop(block_hash, None)
        known.tiers |= _tiers(effect)
        return StoreDone(effect.op_id, ok=True)

    def _find(self, effect: StoreFind) -> StoreDone:
        holders = {}
        for worker, epoch in effect.workers.items():
            known = self.workers.get(worker)
            if known is None or known.epoch != epoch:
                continue
            tiers = [known.tiers.get(block_hash) for block_hash in effect.hashes]
            if not tiers or tiers[0] is None:
                continue
            run = _last(tiers, 1, len(tiers), lambda tier: tier is not None)
            pooled = run
            if tiers[run - 1] != 0:
                pooled = _last(tiers, 0, run - 1, lambda tier: tier == 0)
            holders[worker] = Held(run, run - pooled)
        return StoreDone(effect.op_id, ok=True, holders=holders)


def _last(
    tiers: Sequence[int | None], low: int, high: int, is_so: Callable[[int | None], bool]
) -> int:
    """How many leading tiers are so, between these bounds: searched by halving, since a cache that
    has a block has those before it. It gives up the tail of a prompt before its head."""
    while low < high:
        middle = (low + high + 1) // 2
        if is_so(tiers[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return low


def _tiers(effect: StoreApply | StoreReplace) -> dict[BlockHash, int]:
    """What was said to be in two tiers is in the better one."""
    tiers: dict[BlockHash, int] = {}
    for tier, hashes in sorted(effect.lower.items(), reverse=True):
        tiers |= dict.fromkeys(hashes, tier)
    return tiers | dict.fromkeys(effect.stored, 0)
