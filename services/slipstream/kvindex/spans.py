"""What a kvindex tells of a request: how long its question took."""

from collections.abc import Callable

from slipstream.core.prefix import HASH_BYTES
from slipstream.core.span_recorder import SpanRecorder
from slipstream.messages import Locate, Located, NodeInfo
from slipstream.types import NodeId


class KvIndexSpans(SpanRecorder):
    def __init__(self, node: NodeInfo, wall_offset_ns: Callable[[], int]) -> None:
        super().__init__(node, wall_offset_ns)
        self.heard = {Locate: self._asked}
        self.sent = {Located: self._answers}

    def _asked(self, source: NodeId, message: Locate) -> None:
        blocks = len(message.block_hashes) // HASH_BYTES
        self.book.open(message.request_id, self.now_s)
        self.book.begin(message.request_id, "look up", self.now_s, said={"asked_blocks": blocks})

    def _answers(self, to: NodeId, message: Located) -> None:
        found = max(message.blocks.values(), default=0)
        self.book.end(message.request_id, "look up", self.now_s, {"found_blocks": found})
        self.book.close(message.request_id, self.now_s)
