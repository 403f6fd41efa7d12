"""What one worker says about its prefix cache, on its way into the store, in order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from slipstream.core.machine import Effect, StoreApply, StoreReplace
from slipstream.core.prefix import split_hashes
from slipstream.messages import BlockEvents, Snapshot
from slipstream.types import Epoch, NodeId

QUEUE_MAX = 256
BATCH_HASHES_MAX = 8192
"""More in one `BlockEvents` would hold up every lookup: a snapshot, in small bites, says the
same."""
SNAPSHOT_HASHES_MAX = 1 << 20
"""Of a larger cache the index knows a part."""
ASK_FIRST_S = 1.0
ASK_MAX_S = 30.0


@dataclass(slots=True)
class Feed:
    """Events of one epoch of one worker. One store operation at a time, the others wait.

    Out of step until a snapshot comes: events are passed over, and the worker is asked for one,
    less and less often.
    """

    worker: NodeId
    epoch: Epoch
    kv_layout_id: str = ""
    in_step: bool = False
    ask_at_s: float = 0.0
    op_id: str = ""
    """The operation under way."""
    op_deadline_s: float = 0.0
    queue: deque[StoreApply | StoreReplace] = field(default_factory=deque)
    _ask_after_s: float = ASK_FIRST_S
    _asked_s: float = -ASK_MAX_S

    def snapshot(self, message: Snapshot, kv_layout_id: str) -> None:
        """ValueError: its hashes are torn. Whatever waits is part of it."""
        stored = tuple(split_hashes(message.stored)[:SNAPSHOT_HASHES_MAX])
        self.kv_layout_id, self.in_step = kv_layout_id, True
        self.queue.clear()
        self.queue.append(
            StoreReplace("", self.worker, self.epoch, kv_layout_id, message.seq, stored)
        )

    def events(self, message: BlockEvents, now_s: float) -> None:
        """ValueError: its hashes are torn."""
        if not self.in_step:
            return
        stored, removed = split_hashes(message.stored), split_hashes(message.removed)
        if len(self.queue) >= QUEUE_MAX or len(stored) + len(removed) > BATCH_HASHES_MAX:
            self.lost(now_s)
            return
        self.queue.append(
            StoreApply(
                *("", self.worker, self.epoch, self.kv_layout_id, message.seq),
                *(tuple(stored), tuple(removed)),
            )
        )

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
        self._asked_s = now_s
        self.ask_at_s = now_s + self._ask_after_s
        self._ask_after_s = min(2 * self._ask_after_s, ASK_MAX_S)
