"""A prefill and a decode worker: KV goes from one to the other, or nothing is taken from it."""

import msgspec
import pytest

from core.builders import decode, prefill
from core.workers import (
    LENGTH,
    PROMPT,
    TOKENIZER,
    Worker,
    answer,
    failed,
    handed_over,
    hello,
    relay,
)
from slipstream.core import machine as m
from slipstream.core.receiver import EARLY_KEEP_S, EARLY_MAX
from slipstream.messages import (
    SCHEDULER,
    Finished,
    FirstToken,
    Hello,
    KvReady,
    LiveRequest,
    Release,
    Released,
    Renew,
    Started,
    StreamAck,
    TokensOut,
    WorkerLoad,
)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def source() -> Worker:
    return Worker("prefill-0", accept_decode=False, prefill_budget_tokens=16)


# --- Hand-over ------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["in order", "KvReady overtakes"])
def test_prefill_hands_over_and_decode_goes_on(source: Worker, early: bool) -> None:
    target = Worker(prefill_budget_tokens=0)
    params: dict[str, object] = {"max_tokens": 6, "ignore_eos": True}
    announcement = decode(prompt=PROMPT, source="prefill-0", **params)  # type: ignore[arg-type]
    if not early:
        target.hear(announcement)
    source.hear(prefill(prompt=PROMPT, **params))  # type: ignore[arg-type]
    for _ in range(3):  # 16, 16, 8 tokens
        source.step()
        assert relay(source, target, KvReady) == 1
        if not early:
            target.read(source)
    told = [FirstToken(request_id="r", attempt=1)]
    assert source.to(SCHEDULER) == told, "its part is over, the stream is not"
    assert source.said[0].path == "prefill-0>decode-0" and len(source.output()) == 1
    if early:
        target.hear(announcement)
        target.read(source)
    assert not target.plans, "read is not verified"
    assert source.load["blocks_leased"] == 3
    assert relay(target, source, Release) == 1
    relay(source, target, Released)
    assert target.to(SCHEDULER) == [Started(request_id="r", attempt=1)]
    assert len(target.machine.pool.hashes()) == 2, "a prefix finds what came from there"
    assert target.run()[-1] == Finished(request_id="r", attempt=1)
    assert source.held == 0 and target.held == 0
    target.said = source.said + target.said
    assert target.output() == answer(announcement)[0]
    assert target.said[1].position == 0, "the first token once more: one of the two may be lost"
    assert target.said[1].path == "prefill-0>decode-0"
    assert target.load["blocks_pulled_total"] == 3


@pytest.mark.parametrize("cause", ["digest", "expired"])
def test_what_is_not_verified_is_computed_again(source: Worker, cause: str) -> None:
    target = Worker(prefill_budget_tokens=0)
    message = handed_over(source, target, max_tokens=6, ignore_eos=True)
    target.read(source, wrong=cause == "digest")
    if cause == "expired":
        target.hear(Released(lease_id="r/1", ok=False), "prefill-0")
    assert Started(request_id="r", attempt=1) in target.to(SCHEDULER)
    target.run()
    target.said = source.said + target.said
    assert target.output() == answer(message)[0]
    assert target.load[f"handover_{cause}_total"] == 1


def test_a_stream_that_its_first_token_ends_goes_no_further(source: Worker) -> None:
    source.hear(prefill(prompt=PROMPT, max_tokens=1))
    for _ in range(2):
        source.step()
    assert source.load["blocks_leased"] == 2
    source.step()
    assert [type(message) for _, message in source.sent] == [TokensOut, FirstToken, Finished]
    assert source.said[-1].finish_reason is LENGTH
    assert source.said[-1].path == "prefill-0", "nobody else had a part in it"
    assert source.load["blocks_leased"] == 0 and source.held == 0


def test_the_first_token_may_be_an_end_that_only_the_reader_knows(source: Worker) -> None:
    """The last token of a context that is smaller at the decode worker."""
    target = Worker(max_model_len=41)
    handed_over(source, target, max_tokens=6, ignore_eos=True)
    target.read(source)
    target.hear(Released(lease_id="r/1", ok=True), "prefill-0")
    assert Finished(request_id="r", attempt=1) in target.to(SCHEDULER)
    assert target.said[-1].finish_reason is LENGTH and target.held == 0


def test_a_lost_prefill_worker_ends_what_waits_for_it(source: Worker, worker: Worker) -> None:
    source.hear(prefill(prompt=PROMPT))
    worker.hear(decode(prompt=PROMPT, source="prefill-0"))
    source.step()
    relay(source, worker, KvReady)
    worker.handle(m.PeerDown("prefill-0"))
    assert worker.to(SCHEDULER) == [failed("prefill_lost")]
    assert worker.load["blocks_quarantined"] == worker.held == 3
    worker.read(source)
    assert worker.load["blocks_quarantined"] == worker.held == 0


@pytest.mark.parametrize("steps", [1, 3], ids=["while it computes", "while it lends"])
def test_a_lost_decode_worker_ends_what_is_made_for_it(source: Worker, steps: int) -> None:
    source.hear(prefill(prompt=PROMPT, target="decode-0"))
    source.hear(prefill("other", target="decode-1"))
    for _ in range(steps):
        source.step()
    source.handle(m.PeerDown("decode-0"))
    assert source.to(SCHEDULER).count(failed("decode_lost")) == 1
    assert source.load["blocks_leased"] == (0 if steps == 1 else 1), "the other one's"


def test_leases_are_renewed_and_lapse_without_it(source: Worker, worker: Worker) -> None:
    handed_over(source, worker)
    assert Renew(lease_ids=["r/1"]) in worker.pass_time(2.0)
    source.pass_time(9.0)
    source.hear(Renew(lease_ids=["r/1"]), "decode-0")
    source.pass_time(9.0)
    assert source.load["blocks_leased"] == 3
    source.pass_time(2.0)
    assert source.load["blocks_leased"] == 0 and source.load["leases_lapsed_total"] == 1
    source.hear(Release(lease_id="r/1", epoch=7), "decode-0")
    assert source.to("decode-0") == [Released(lease_id="r/1", ok=False)]


def test_a_lease_of_an_earlier_process_is_not_vouched_for(source: Worker, worker: Worker) -> None:
    handed_over(source, worker)
    source.hear(Release(lease_id="r/1", epoch=6), "decode-0")
    assert source.to("decode-0") == [Released(lease_id="r/1", ok=False)]
    assert source.load["blocks_leased"] == 3


def test_early_announcements_are_bounded_in_number_and_time(source: Worker, worker: Worker) -> None:
    source.hear(prefill(prompt=PROMPT[:10]))
    source.step()
    (said,) = [message for message in source.to("decode-0") if isinstance(message, KvReady)]
    worker.hear(said, "prefill-0")
    worker.pass_time(EARLY_KEEP_S + 1)
    worker.hear(decode(prompt=PROMPT[:10], source="prefill-0"))
    assert not worker.pulls, "forgotten; the deadline will end it"
    for number in range(EARLY_MAX + 10):
        worker.hear(KvReady(**{**_fields(said), "request_id": f"r{number}"}), "prefill-0")
    worker.hear(decode("r5", PROMPT[:10], source="prefill-0"))
    assert not worker.pulls
    worker.hear(decode("r11", PROMPT[:10], source="prefill-0"))
    assert len(worker.pulls) == 1


def _fields(message: KvReady) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


# --- What others hear of it ---


def test_a_worker_reports_what_lives_in_it_and_what_is_half_a_hand_over(
    source: Worker, worker: Worker
) -> None:
    source.hear(prefill(prompt=PROMPT, max_tokens=6, ignore_eos=True))
    worker.hear(decode(prompt=PROMPT, source="prefill-0", max_tokens=6, ignore_eos=True))
    worker.hear(decode("own", max_tokens=2, attempt=3, ignore_eos=True))
    assert hello(source).live == [LiveRequest("r", 1, waits=True)]
    assert hello(worker).live == [LiveRequest("r", 1, waits=True), LiveRequest("own", 3)]
    worker.run()  # "own" has ended, and its tokenizer has not said that it knows
    while source.plans:
        source.step()
        relay(source, worker, KvReady)
    assert hello(source).live == [], "a lease is no request"
    assert hello(worker).live == [LiveRequest("r", 1), LiveRequest("own", 3)], "r could go on alone"


def test_load_twice_a_second_counts_each_block_once(source: Worker, worker: Worker) -> None:
    handed_over(source, worker)
    source.hear(prefill("s", PROMPT))
    loads = [said for said in source.pass_time(2.0) if isinstance(said, WorkerLoad)]
    assert len(loads) == 4
    load = loads[-1]
    assert (load.running, load.waiting, load.waiting_tokens) == (1, 0, 8)
    assert (load.blocks_leased, load.blocks_cached) == (3, 0), "s has hit two: leased goes first"
    assert load.blocks_free + load.blocks_used + load.blocks_leased == 16
    source.run()
    source.handle(m.PeerDown("decode-0"))
    assert (source.load["blocks_leased"], source.load["steps"]) == (0, 4)
    assert source.load["blocks_used"] == source.load["blocks_cached"] == 2, "at rest"
    assert source.load["prefix_hit_tokens_total"] == 32
    assert source.load["prefix_query_tokens_total"] == 80


def test_a_drained_worker_leaves_when_it_is_empty(source: Worker, worker: Worker) -> None:
    handed_over(source, worker, max_tokens=3, ignore_eos=True)
    for side in (source, worker):
        side.handle(m.Drain())
        (said,) = [message for message in side.to(SCHEDULER) if isinstance(message, Hello)]
        assert said.node.draining and not side.exits
    worker.read(source)
    relay(worker, source, Release)
    assert source.exits, "its last lease is back"
    relay(source, worker, Released)
    while worker.plans:
        assert not worker.exits
        worker.step()
    assert not worker.exits, "the end is not heard yet"
    worker.hear(StreamAck(request_id="r", attempt=1), TOKENIZER)
    assert worker.exits


def test_a_hand_over_that_is_given_up_at_its_deadline_runs_for_nobody(
    source: Worker, worker: Worker
) -> None:
    """Both are noticed by one tick: it is to be computed here after all, and it is too late."""
    source.hear(prefill(prompt=PROMPT))
    while source.plans:
        source.step()
        relay(source, worker, KvReady)
    message = decode(prompt=PROMPT, source="prefill-0")
    worker.hear(msgspec.structs.replace(message, timeout_s=5.9))
    worker.pass_time(11.0)
    assert not (worker.plans or worker.machine.jobs or worker.machine.batcher.running)
    worker.read(source)
    assert worker.held == 0 and hello(worker).live == []
