"""What a frontend tells of a request, and its way to the traces."""

import msgspec

from core.recorded import beside, ms, named, tree
from frontend.test_machine import T0, T1, Rig, delta
from slipstream.core.machine import Closed, DeliverTrace, Opened, PeerDown, Send, TraceAsked
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.spans import FrontendSpans
from slipstream.messages import SCHEDULER, Failed, FindTrace, TextOut, Tokenized, TraceFound
from slipstream.spans import TENANT, RequestSpans, TraceContext
from tokenizer.machines import submission

CONTEXT = TraceContext(trace_id="a" * 32, parent_id="b" * 16)


def rig(*names: str) -> tuple[Rig, FrontendSpans]:
    rig = Rig(*names)
    spans = FrontendSpans(rig.machine.membership.node, lambda: 0)
    beside(rig.machine, spans)
    rig.now_s = 1.0
    rig.handle(Opened(submission("r"), CONTEXT, "demo"))
    return rig, spans


def told(rig: Rig, spans: FrontendSpans) -> RequestSpans:
    (request,) = spans.book.take(rig.now_s, 0)
    assert request.over and request.request_id == "r" and request.context == CONTEXT
    return request


def test_an_answer() -> None:
    cluster, spans = rig(T0)
    cluster.now_s = 1.002
    cluster.hear(T0, Tokenized(request_id="r", prompt_tokens=7))
    cluster.now_s = 1.010
    cluster.deltas(T0, delta(b"ab"))
    cluster.now_s = 1.020
    cluster.deltas(T0, delta(b"c", 2))
    cluster.now_s = 1.030
    cluster.deltas(T0, delta(b"d", 3, end=True))
    cluster.now_s = 1.040
    cluster.handle(Closed("r"))
    request = told(cluster, spans)
    assert tree(request.spans) == [
        ("", "request"),
        ("", "tokenize"),
        ("", "first token"),
        ("", "stream"),
    ]
    found = named(request.spans)
    times = {name: tuple(round(at) for at in ms(span)) for name, span in found.items()}
    assert times == {
        "request": (1000, 30),
        "tokenize": (1000, 2),
        "first token": (1002, 8),
        "stream": (1010, 20),
    }
    said = found["request"].attributes
    assert said["gen_ai.request.model"] == "demo" and said["tokenizer"] == T0
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.response.finish_reasons"] == "stop" and "error.type" not in said
    assert TENANT not in said


def test_whose_it_is() -> None:
    cluster, spans = rig()
    cluster.handle(
        Opened(msgspec.structs.replace(submission("s"), tenant="alice"), CONTEXT, "demo")
    )
    cluster.handle(Closed("s"))
    (whose,) = [one for one in spans.book.take(cluster.now_s, 0) if one.request_id == "s"]
    assert named(whose.spans)["request"].attributes[TENANT] == "alice"


def test_a_stream_that_moves_to_another_tokenizer() -> None:
    cluster, spans = rig(T0, T1)
    holder = next(e.to for e in cluster.effects if isinstance(e, Send))
    cluster.handle(PeerDown(holder))
    cluster.pass_time(1.0)
    cluster.handle(Closed("r"))
    said = named(told(cluster, spans).spans)["request"].attributes
    assert said["tokenizer"] == holder and said["moved_to"] != holder


def test_a_client_that_leaves() -> None:
    cluster, spans = rig(T0)
    cluster.handle(Closed("r"))
    found = named(told(cluster, spans).spans)
    assert found["request"].attributes["error.type"] == "client_left"
    assert found["tokenize"].end_ns


def test_a_request_that_fails() -> None:
    cluster, spans = rig(T0)
    problem = Problem(code=ErrorCode.CONTEXT_LENGTH, message="m")
    cluster.hear(T0, Failed(request_id="r", problem=problem))
    assert spans.book.live, "its handler has not closed"
    cluster.handle(Closed("r"))
    said = named(told(cluster, spans).spans)["request"].attributes
    assert said["error.type"] == "context_length_exceeded"


def test_a_request_that_is_refused() -> None:
    cluster, spans = rig()
    cluster.handle(Closed("r"))
    said = named(told(cluster, spans).spans)["request"].attributes
    assert said["error.type"] == "not_ready"


def test_tokens_that_are_skipped_are_no_first_token() -> None:
    cluster, spans = rig(T0)
    cluster.hear(T0, Tokenized(request_id="r", prompt_tokens=7))
    cluster.hear(T0, TextOut(deltas=[delta(b"late", 5)]))
    assert spans.book.is_open("r", "first token")


def test_who_asks_for_a_trace() -> None:
    cluster, _ = rig(T0)
    cluster.handle(TraceAsked("c", "name"))
    assert cluster.effects == [Send(SCHEDULER, FindTrace(call_id="c", name="name"))]
    found = TraceFound(call_id="c", kept=5)
    cluster.hear(SCHEDULER, found)
    assert cluster.effects == [DeliverTrace(found)]
