"""What the scheduler tells of a request, and who can ask it for whole traces."""

from core.recorded import beside, ms, named, tree
from scheduler.rig import DECODE, INDEX, PREFILL, TOKENIZER, WORKING, Rig, submit
from slipstream.core.machine import Counted
from slipstream.messages import (
    AttemptFailed,
    FindTrace,
    Finished,
    FirstToken,
    Located,
    Spans,
    StreamEnded,
    TraceFound,
)
from slipstream.scheduler.spans import SchedulerSpans
from slipstream.spans import RequestSpans, Span, Trace
from slipstream.types import Role

FRONTEND = "frontend-0"


def rig(*nodes: str, **settings: object) -> tuple[Rig, SchedulerSpans]:
    rig = Rig(*nodes, **settings)  # type: ignore[arg-type]
    spans = SchedulerSpans(rig.machine, lambda: 0)
    beside(rig.machine, spans)
    rig.now_s = 100.0
    return rig, spans


def find(rig: Rig, name: str = "r") -> TraceFound:
    rig.hear(FRONTEND, FindTrace(call_id="c", name=name))
    to, found = rig.one(TraceFound)
    assert to == FRONTEND and found.call_id == "c"
    return found


def own(trace: Trace) -> list[Span]:
    (process,) = [p for p in trace.processes if p.role is Role.SCHEDULER]
    return process.spans


def test_a_request_from_its_submission_to_its_end() -> None:
    cluster, spans = rig(*WORKING, INDEX)
    cluster.submit("r", prompt=40, hashes=bytes(32))
    cluster.now_s += 0.010
    cluster.hear(INDEX, Located(request_id="r", attempt=1, blocks={DECODE: 1, PREFILL: 2}))
    cluster.now_s += 0.020
    cluster.hear(PREFILL, FirstToken(request_id="r", attempt=1, cached_tokens=16))
    cluster.now_s += 0.030
    cluster.hear(PREFILL, Finished(request_id="r", attempt=1))
    cluster.now_s += 0.005
    cluster.hear(TOKENIZER, StreamEnded(request_id="r"))
    assert not spans.book.live
    (trace,) = find(cluster).traces
    assert tree(own(trace)) == [
        ("", "schedule"),
        ("schedule", "queued"),
        ("queued", "locate"),
        ("schedule", "run"),
        ("run", "first token"),
    ]
    found = named(own(trace))
    assert [round(ms(found[name])[1]) for name in found] == [65, 10, 10, 50, 20]
    assert found["locate"].attributes == {"peer": INDEX, "blocks": 2, "found_blocks": 2}
    run = found["run"].attributes
    assert (run["prefill"], run["decode"], run["attempt"]) == (PREFILL, DECODE, 1)
    assert str(run["decision"]).startswith("policy=cost; ")
    decision = trace.decision
    assert decision["decode"] == DECODE and decision["cached_tokens"] == 16
    assert "predicted_ttft_s" in decision and round(float(decision["actual_ttft_s"]), 6) == 0.02


def test_what_waits_is_seen_while_it_waits() -> None:
    cluster, _ = rig(TOKENIZER, DECODE, disaggregation="never")
    cluster.submit("r", prompt=200)
    cluster.submit("s", prompt=200)
    (trace,) = find(cluster, "s").traces
    assert [(s.name, s.end_ns) for s in own(trace)] == [("schedule", 0), ("queued", 0)]


def test_an_attempt_that_fails_and_the_next_one() -> None:
    cluster, spans = rig(*WORKING, "decode-1")
    cluster.submit("r")
    (_, placed) = next(iter(cluster.machine.requests.items()))
    cluster.hear(str(placed.decode), AttemptFailed(request_id="r", attempt=1, cause="step: no"))
    cluster.hear(TOKENIZER, submit("r", 2))
    cluster.hear(TOKENIZER, StreamEnded(request_id="r"))
    (trace,) = find(cluster).traces
    runs = [span.attributes for span in own(trace) if span.name == "run"]
    assert [run["attempt"] for run in runs] == [1, 2]
    assert runs[0]["error.type"] == "step" and "error.type" not in runs[1]
    assert named(own(trace))["schedule"].attributes["attempts"] == 2
    assert not spans.book.live


def test_a_request_that_is_refused() -> None:
    cluster, spans = rig(*WORKING)
    cluster.submit("r", prompt=1000)
    assert cluster.problem() and not spans.book.live
    (trace,) = find(cluster).traces
    assert named(own(trace))["schedule"].attributes["error.type"] == "context_length_exceeded"


def test_a_silent_tokenizer_leaves_nothing_open() -> None:
    cluster, spans = rig(*WORKING)
    cluster.submit("r")
    cluster.lose(TOKENIZER)
    cluster.pass_time(20.0)
    assert not cluster.machine.requests and not spans.book.live


def test_what_others_tell_is_beside_it() -> None:
    cluster, _ = rig(*WORKING)
    told = Span(number=7, name="chunk", begin_ns=3, end_ns=4)
    requests = [RequestSpans(request_id="chatcmpl-x-0", spans=[told])]
    cluster.hear(PREFILL, Spans(role=Role.PREFILL, epoch=5, requests=requests))
    (trace,) = find(cluster, "chatcmpl-x").traces
    (process,) = trace.processes
    assert (process.node_id, process.epoch, process.spans) == (PREFILL, 5, [told])


def test_nobody_has_heard_of_it() -> None:
    cluster, _ = rig(*WORKING)
    cluster.submit("r")
    cluster.hear(TOKENIZER, StreamEnded(request_id="r"))
    assert find(cluster, "x") == TraceFound(call_id="c", kept=1)


def test_what_the_exporter_counts_is_among_the_statistics() -> None:
    cluster, _ = rig()
    cluster.handle(Counted({"otlp_spans_sent_total": 5}))
    assert cluster.count("otlp_spans_sent_total") == 5
