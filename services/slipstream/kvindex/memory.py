"""The index store without Redis: what `RedisStore` does, in one process and at once.

For the simulator, and as the specification that the tests hold Redis against.
"""

from dataclasses import dataclass, field

from slipstream.core.machine import (
    Effect,
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
    last_seq: int


@dataclass(slots=True)
class MemoryStore:
    workers: dict[NodeId, _Worker] = field(default_factory=dict)
    entries: dict[tuple[str, BlockHash], dict[NodeId, Epoch]] = field(default_factory=dict)

    def apply(self, effect: Effect) -> StoreDone | None:
        """One store effect; None where nothing comes back."""
        match effect:
            case StoreApply():
                return self._apply(effect)
            case StoreReplace():
                return self._replace(effect)
            case StoreFind():
                return self._find(effect)
            case StoreAlive():
                return None
            case StoreForget(worker, epoch):
                self._forget(worker, epoch)
                return None
        raise TypeError(f"a store does not execute {type(effect).__name__}")

    def lapse(self, worker: NodeId) -> None:
        """What the end of `PEXPIRE` does: nobody knows any more up to where events were applied."""
        self.workers.pop(worker, None)

    def flush(self) -> None:
        self.workers.clear()
        self.entries.clear()

    def _apply(self, effect: StoreApply) -> StoreDone:
        known = self.workers.get(effect.worker)
        if known is None or (known.epoch, known.last_seq) != (effect.epoch, effect.seq - 1):
            return StoreDone(effect.op_id, ok=True, gap=True)
        known.last_seq = effect.seq
        for block_hash in effect.removed:
            self._discard(effect.kv_layout_id, block_hash, effect.worker, effect.epoch)
        self._add(effect, effect.stored)
        return StoreDone(effect.op_id, ok=True)

    def _replace(self, effect: StoreReplace) -> StoreDone:
        known = self.workers.get(effect.worker)
        if known is not None and known.epoch > effect.epoch:
            return StoreDone(effect.op_id, ok=True, gap=True)
        self._sweep(effect.worker, effect.epoch)
        self.workers[effect.worker] = _Worker(effect.epoch, effect.seq)
        self._add(effect, effect.stored)
        return StoreDone(effect.op_id, ok=True)

    def _find(self, effect: StoreFind) -> StoreDone:
        holders = []
        for block_hash in effect.hashes:
            found = self.entries.get((effect.kv_layout_id, block_hash))
            if not found:
                break
            holders.append(dict(found))
        return StoreDone(effect.op_id, ok=True, holders=tuple(holders))

    def _forget(self, worker: NodeId, epoch: Epoch) -> None:
        known = self.workers.get(worker)
        if known is not None and known.epoch <= epoch:
            del self.workers[worker]
        self._sweep(worker, epoch)

    def _sweep(self, worker: NodeId, epoch: Epoch) -> None:
        """Entries of the worker up to this epoch go."""
        for layout, block_hash in list(self.entries):
            self._discard(layout, block_hash, worker, epoch)

    def _add(self, effect: StoreApply | StoreReplace, hashes: tuple[BlockHash, ...]) -> None:
        for block_hash in hashes:
            found = self.entries.setdefault((effect.kv_layout_id, block_hash), {})
            found[effect.worker] = effect.epoch

    def _discard(self, layout: str, block_hash: BlockHash, worker: NodeId, epoch: Epoch) -> None:
        found = self.entries.get((layout, block_hash), {})
        if found.get(worker, epoch + 1) <= epoch:
            del found[worker]
            if not found:
                del self.entries[layout, block_hash]
