"""What a kvindex tells of a request."""

from slipstream.core.machine import PeerUp, Received, Send, TimerFired
from slipstream.core.span_recorder import SPANS_TIMER
from slipstream.kvindex.spans import GIVEN_UP_S, KvIndexSpans
from slipstream.messages import SCHEDULER, Locate, Located, NodeInfo, Spans
from slipstream.types import Role


def test_a_question_and_its_answer() -> None:
    node = NodeInfo(node_id="kvindex-0", role=Role.KVINDEX, epoch=4, address="a")
    spans = KvIndexSpans(node, lambda: 1000)
    spans.saw(PeerUp(SCHEDULER, 1), [], 0.0)
    locate = Locate(request_id="r", attempt=1, kv_layout_id="l", block_hashes=bytes(48))
    spans.saw(Received(SCHEDULER, locate), [], 1.0)
    located = Located(request_id="r", attempt=1, blocks={"decode-0": 1, "decode-1": 2})
    (timer,) = spans.saw(TimerFired("x"), [Send(SCHEDULER, located)], 1.5)
    (send,) = spans.saw(TimerFired(SPANS_TIMER), [], timer.at_s)
    assert isinstance(send.message, Spans) and send.to == SCHEDULER
    assert (send.message.role, send.message.epoch) == (Role.KVINDEX, 4)
    (request,) = send.message.requests
    (span,) = request.spans
    assert (span.name, span.begin_ns, span.end_ns) == ("look up", 10**9 + 1000, 15 * 10**8 + 1000)
    assert span.attributes == {"asked_blocks": 3, "found_blocks": 2}


def test_a_question_that_is_never_answered() -> None:
    node = NodeInfo(node_id="kvindex-0", role=Role.KVINDEX, epoch=4, address="a")
    spans = KvIndexSpans(node, lambda: 0)
    locate = Locate(request_id="r", attempt=1, kv_layout_id="l", block_hashes=bytes(48))
    spans.saw(Received(SCHEDULER, locate), [], 1.0)
    spans.saw(TimerFired("tick"), [], 1.0 + GIVEN_UP_S - 0.1)
    assert spans.book.live
    spans.saw(TimerFired("tick"), [], 1.0 + GIVEN_UP_S)
    (request,) = spans.book.take(9.0, 0)
    assert request.over and request.spans[0].attributes["error.type"] == "timeout"
