"""What one worker says about its prefix cache, on its way into the store, in order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from slipstream.core.machine import Effect, StoreAlive, StoreApply, StoreReplace
from slipstream.core.prefix import split_hashes
from slipstream.messages import BlockEvents, Snapshot
from slipstream.types import BlockHash, Epoch, NodeId

QUEUE_MAX = 256
BATCH_HASHES_MAX = 8192
"""More in one `BlockEvents` would hold up every lookup: a snapshot, in small bites, says the
same."""
SNAPSHOT_HASHES_MAX = 1 << 20
"""Of a larger cache the index knows a part."""
ASK_FIRST_S = 1.0
ASK_MAX_S = 30.0
ASKS_MAX = 6
"""A worker that has answered none of so many tells another kvindex."""

_Op: TypeAlias = StoreApply | StoreReplace | StoreAlive


@dataclass(slots=True)
class Feed:
    """Events of one epoch of one worker. One store operation at a time, the others wait.

    Out of step until a snapshot comes: events are passed over, and the worker is asked for one,
    less and less often.
    """

    worker: NodeId
    epoch: Epoch
    in_step: bool = False
    seq: int = 0
    """Of what was queued last."""
    ask_at_s: float = 0.0
    """When a snapshot is next wanted; in step, to mend what nobody has noticed."""
    asks: int = 0
    """Since the last snapshot."""
    op_id: str = ""
    """The operation under way."""
    op_deadline_s: float = 0.0
    queue: deque[_Op] = field(default_factory=deque)
    _ask_after_s: float = ASK_FIRST_S
    _asked_s: float = -ASK_MAX_S

    def snapshot(self, message: Snapshot, again_s: float) -> None:
        """ValueError: its hashes are torn. Whatever waits is part of it. The next one is wanted at
        `again_s`."""
        stored, lower = _split(message.stored), _split_tiers(message.lower)
        stored = stored[:SNAPSHOT_HASHES_MAX]
        left = SNAPSHOT_HASHES_MAX - len(stored)
        for tier in sorted(lower):
            lower[tier] = lower[tier][:left]
            left -= len(lower[tier])
        self.in_step, self.asks, self.seq, self.ask_at_s = True, 0, message.seq, again_s
        self.queue.clear()
        self.queue.append(StoreReplace("", self.worker, self.epoch, message.seq, stored, lower))

    def events(self, message: BlockEvents, now_s: float) -> None:
        """ValueError: its hashes are torn."""
        if not self.in_step:
            return
        stored, removed = _split(message.stored), _split(message.removed)
        lower = _split_tiers(message.lower)
        count = len(stored) + len(removed) + sum(map(len, lower.values()))
        if len(self.queue) >= QUEUE_MAX or count > BATCH_HASHES_MAX:
            self.lost(now_s)
            return
        self.seq = message.seq
        self.queue.append(
            StoreApply("", self.worker, self.epoch, message.seq, stored, removed, lower)
        )

    def renew(self) -> None:
        """Let the store say whether it still has what it was told."""
        if self.in_step and not self.op_id and not self.queue:
            self.queue.append(StoreAlive("", self.worker, self.epoch, self.seq))

    def next(self, new_op: Callable[[], str], deadline_s: float) -> list[Effect]:
        """The next operation, if none is under way."""
        if self.op_id or not self.queue:
            return []
        self.op_id, self.op_deadline_s = new_op(), deadline_s
        return [msgspec.structs.replace(self.queue.popleft(), op_id=self.op_id)]

    def done(self, ok: bool, gap: bool, now_s: float) -> None:
        """The operation under way has ended."""
        self.op_id = ""
        if ok and not gap:
            if self.in_step:
                self._ask_after_s = ASK_FIRST_S
        elif not any(isinstance(waiting, StoreReplace) for waiting in self.queue):
            self.lost(now_s)

    def lost(self, now_s: float) -> None:
        """The store does not have what the worker said: nothing but a snapshot helps."""
        self.in_step = False
        self.queue.clear()
        self.ask_at_s = max(now_s, self._asked_s + self._ask_after_s)

    def asked(self, now_s: float) -> None:
        self.asks += 1
        self._asked_s = now_s
        self.ask_at_s = now_s + self._ask_after_s
        self._ask_after_s = min(2 * self._ask_after_s, ASK_MAX_S)


def _split(packed: bytes) -> tuple[BlockHash, ...]:
    return tuple(split_hashes(packed))


def _split_tiers(lower: dict[int, bytes]) -> dict[int, tuple[BlockHash, ...]]:
    """Tier 0 has a field of its own."""
    return {tier: _split(packed) for tier, packed in lower.items() if tier > 0}
