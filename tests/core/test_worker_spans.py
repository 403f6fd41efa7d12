"""What prefill and decode workers tell of a request."""

from core.builders import EPOCH, decode, node_info, prefill
from core.recorded import beside, ms, named, tree
from core.workers import PROMPT, Worker, handed_over, relay
from slipstream.core import machine as m
from slipstream.core import worker_spans
from slipstream.core.span_book import LONG_S
from slipstream.core.worker_spans import WorkerSpans
from slipstream.messages import SCHEDULER, Drop, KvReady, Lent, Release, Released, Spans
from slipstream.spans import Span


def watched(node_id: str = "decode-0", **info: object) -> tuple[Worker, WorkerSpans]:
    worker = Worker(node_id, **info)  # type: ignore[arg-type]
    node = node_info(node_id, 7 if node_id.startswith("prefill") else EPOCH, worker.info)
    spans = WorkerSpans(node, lambda: 0, worker.machine.batcher)
    beside(worker.machine, spans)
    worker.handle(m.PeerUp(SCHEDULER, 1))
    return worker, spans


def told(worker: Worker, seconds: float = 0.3) -> list[Span]:
    """Once it is over."""
    said = worker.pass_time(seconds)
    requests = [r for message in said if isinstance(message, Spans) for r in message.requests]
    assert all(request.over and request.request_id == "r" for request in requests)
    return [span for request in requests for span in request.spans]


def test_a_worker_alone() -> None:
    worker, _ = watched(prefill_budget_tokens=16)
    worker.hear(decode(prompt=PROMPT, max_tokens=3, ignore_eos=True))
    while worker.plans:
        worker.now_s += 0.010
        plan = worker.plans.pop()
        worker.device.admit(plan)
        outputs, digests = worker.device.run(plan)
        worker.handle(m.BatchDone(plan.step, outputs, digests, elapsed_s=0.008))
    spans = told(worker)
    assert tree(spans) == [
        ("", "decode"),
        ("decode", "queued"),
        *[("decode", "chunk")] * 3,
        ("decode", "generate"),
    ]
    chunks = [span for span in spans if span.name == "chunk"]
    assert [ms(chunk) for chunk in chunks] == [(2.0, 8.0), (12.0, 8.0), (22.0, 8.0)]
    said = [(chunk.attributes["from"], chunk.attributes["tokens"]) for chunk in chunks]
    assert said == [(0, 16), (16, 16), (32, 8)]
    found = named(spans)
    assert ms(found["generate"]) == (30.0, 20.0) and ms(found["decode"]) == (0.0, 50.0)
    assert found["decode"].attributes == {
        "attempt": 1,
        "prompt_tokens": 40,
        "output_tokens": 3,
        "cached_tokens": 0,
        "finish_reason": "length",
    }


def test_a_hand_over_on_both_sides() -> None:
    source, _ = watched("prefill-0", prefill_budget_tokens=16)
    target, _ = watched("decode-0")
    handed_over(source, target, max_tokens=3)
    target.now_s = 0.02
    target.read(source)
    assert relay(target, source, Release) and relay(source, target, Released)
    target.run()
    spans = told(source)
    assert tree(spans) == [("", "prefill"), ("prefill", "queued"), *[("prefill", "chunk")] * 3]
    assert named(spans)["prefill"].attributes["peer"] == "decode-0"
    spans = told(target)
    assert sorted(set(tree(spans))) == [
        ("", "decode"),
        ("decode", "awaits prefill"),
        ("decode", "generate"),
        ("decode", "hand-over"),
        ("hand-over", "read"),
    ]
    found = named(spans)
    reads = [span.attributes["blocks"] for span in spans if span.name == "read"]
    assert reads == [1, 2], "what was announced by then, and the rest"
    assert found["hand-over"].attributes == {
        "peer": "prefill-0",
        "transport": "",
        "blocks": 3,
        "bytes": 3 * target.info.block_bytes,
        "verified": True,
    }


def test_a_hand_over_that_came_torn_is_computed_again() -> None:
    source, _ = watched("prefill-0")
    target, _ = watched("decode-0")
    handed_over(source, target, max_tokens=3)
    target.read(source, wrong=True)
    target.run()
    spans = told(target)
    assert ("decode", "chunk") in tree(spans) and ("decode", "generate") in tree(spans)
    found = named(spans)
    assert found["hand-over"].attributes["verified"] is False
    assert found["queued"].attributes == {"computed_again": True}


def test_a_hand_over_whose_lease_did_not_live() -> None:
    source, _ = watched("prefill-0")
    target, _ = watched("decode-0")
    handed_over(source, target, max_tokens=3)
    target.read(source)
    target.hear(Released(lease_id="r/1", ok=False), "prefill-0")
    target.run()
    spans = told(target)
    assert named(spans)["hand-over"].attributes["verified"] is False
    assert ("decode", "chunk") in tree(spans)


def test_a_prefix_that_another_worker_lends() -> None:
    worker, _ = watched()
    worker.hear(decode(prompt=PROMPT, holder="decode-1", holder_blocks=2))
    worker.now_s = 0.01
    nothing = Lent(request_id="r", attempt=1, lease_id="r/1@decode-0", epoch=EPOCH)
    worker.hear(nothing, "decode-1")
    worker.run()
    found = named(told(worker))
    assert found["fetch"].attributes == {"peer": "decode-1", "asked_blocks": 2, "lent_blocks": 0}
    assert ms(found["fetch"]) == (0.0, 10.0) and found["fetch"].parent == found["queued"].number


def test_chunks_beyond_many_are_one_span(monkeypatch) -> None:
    monkeypatch.setattr(worker_spans, "CHUNKS_MAX", 2)
    worker, _ = watched(prefill_budget_tokens=16, num_blocks=16)
    worker.hear(decode(prompt=list(range(1, 61)) * 2, max_tokens=1))
    worker.run()
    spans = told(worker)
    assert tree(spans).count(("decode", "chunk")) == 2
    assert named(spans)["more chunks"].attributes == {"tokens": 120 - 32}


def test_a_dropped_attempt_and_the_next_one() -> None:
    worker, spans = watched()
    worker.hear(decode(prompt=PROMPT, attempt=1))
    worker.hear(Drop(request_id="r", attempt=1))
    assert not spans.book.live
    worker.hear(decode(prompt=PROMPT, attempt=3))
    worker.hear(decode(prompt=PROMPT, attempt=2))
    worker.run()
    attempts = {s.attributes["attempt"]: s for s in told(worker) if s.name == "decode"}
    assert attempts.keys() == {1, 3} and attempts[1].attributes["outcome"] == "dropped"


def test_a_preempted_request_waits_again() -> None:
    worker, _ = watched(num_blocks=4, prefill_budget_tokens=64)
    worker.hear(decode(prompt=PROMPT[:16], max_tokens=40, ignore_eos=True))
    worker.hear(decode("s", prompt=PROMPT[1:17], max_tokens=40, ignore_eos=True))
    worker.run()
    said = [message for message in worker.pass_time(0.3) if isinstance(message, Spans)]
    spans = [s for message in said for r in message.requests for s in r.spans]
    again = [span for span in spans if span.attributes.get("preemptions")]
    assert worker.machine.batcher.preemptions and again
    assert all(span.name == "queued" for span in again)
    assert any(span.attributes.get("preempted") for span in spans if span.name == "generate")


def test_a_stream_costs_nothing_for_each_token() -> None:
    """Steps are not looked through while no prompt is being computed."""
    worker, spans = watched()
    worker.hear(decode(prompt=PROMPT, max_tokens=10, ignore_eos=True))
    worker.step()

    class Unread(tuple):
        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("the rows are read")

    while worker.plans:
        (plan,) = worker.plans
        spans.saw(m.TimerFired("x"), [m.RunBatch(m.BatchPlan(99, Unread(plan.rows)))], 0.0)
        worker.step()
    assert worker.output()


def test_nothing_is_said_while_the_scheduler_is_away() -> None:
    worker, _ = watched()
    worker.handle(m.PeerDown(SCHEDULER))
    worker.hear(decode(prompt=PROMPT, max_tokens=2, ignore_eos=True))
    worker.run()
    assert not told(worker, 2 * LONG_S)
    worker.handle(m.PeerUp(SCHEDULER, 2))
    assert told(worker), "it was kept"


def test_what_announcements_overtook_is_told_too() -> None:
    source, _ = watched("prefill-0")
    target, _ = watched("decode-0")
    source.hear(prefill(prompt=PROMPT, max_tokens=3))
    source.step()
    relay(source, target, KvReady)
    target.hear(decode(prompt=PROMPT, source="prefill-0", max_tokens=3))
    target.read(source)
    relay(target, source, Release)
    relay(source, target, Released)
    target.run()
    assert ("hand-over", "read") in tree(told(target))
