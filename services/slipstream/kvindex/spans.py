"""What a kvindex tells of a request: how long its question took."""

from collections.abc import Callable

from slipstream.core.machine import TimerFired
from slipstream.core.prefix import HASH_BYTES
from slipstream.core.span_recorder import SpanRecorder
from slipstream.messages import Locate, Located, NodeInfo
from slipstream.types import NodeId, RequestId

GIVEN_UP_S = 5.0
"""A question that is not answered by then never is."""


class KvIndexSpans(SpanRecorder):
    def __init__(self, node: NodeInfo, wall_offset_ns: Callable[[], int]) -> None:
        super().__init__(node, wall_offset_ns)
        self._asked_s: dict[RequestId, float] = {}
        """Those without an answer, the oldest first."""
        self.heard = {Locate: self._asked}
        self.happened = {TimerFired: self._timer}
        self.sent = {Located: self._answers}

    def _asked(self, source: NodeId, message: Locate) -> None:
        blocks = len(message.block_hashes) // HASH_BYTES
        self._asked_s.setdefault(message.request_id, self.now_s)
        self.book.open(message.request_id, self.now_s)
        self.book.begin(message.request_id, "look up", self.now_s, said={"asked_blocks": blocks})

    def _answers(self, to: NodeId, message: Located) -> None:
        found = max(message.blocks.values(), default=0)
        self.book.end(message.request_id, "look up", self.now_s, {"found_blocks": found})
        self._close(message.request_id)

    def _timer(self, event: TimerFired) -> None:
        while self._asked_s:
            request_id, asked_s = next(iter(self._asked_s.items()))
            if self.now_s < asked_s + GIVEN_UP_S:
                break
            self.book.end(request_id, "look up", self.now_s, {"error.type": "timeout"})
            self._close(request_id)

    def _close(self, request_id: RequestId) -> None:
        self._asked_s.pop(request_id, None)
        self.book.close(request_id, self.now_s)
