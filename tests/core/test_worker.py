"""A worker event by event: streams, their ends, and what it tells whom."""

import msgspec
import pytest

from core.builders import EPOCH, decode, node_info, prefill
from core.workers import (
    LENGTH,
    PROMPT,
    STOP,
    TOKENIZER,
    Worker,
    answer,
    failed,
)
from sim.device import EOS
from slipstream.core import machine as m
from slipstream.core.worker import (
    DEADLINE_SLACK_S,
    LOG_KEEP_S,
)
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    SCHEDULER,
    AttemptFailed,
    Decode,
    Drop,
    Finished,
    FirstToken,
    Hello,
    Peers,
    Prefill,
    Resend,
    ShiftRole,
    Snapshot,
    SnapshotRequest,
    StreamAck,
    WorkerLoad,
)
from slipstream.types import BLOCK_TOKENS, FinishReason, unpack_tokens


@pytest.fixture
def worker() -> Worker:
    return Worker()


# --- One worker -----------------------------------------------------------------------------------


def test_a_stream_from_prompt_to_end(worker: Worker) -> None:
    message = decode(prompt=PROMPT, max_tokens=5, ignore_eos=True)
    worker.hear(message)
    assert worker.run() == [
        FirstToken(request_id="r", attempt=1),
        Finished(request_id="r", attempt=1),
    ]
    tokens, reason = answer(message)
    assert worker.output() == tokens and len(worker.said) == 5, "one message a step"
    last = worker.said[-1]
    assert (last.finish_reason, last.path, last.cached_tokens) == (reason, "decode-0", 0)
    assert worker.held == 0 and not worker.machine.jobs


@pytest.mark.parametrize(
    ("made", "params", "shown", "reason", "stop_token"),
    [
        ([5, EOS], {}, [5, EOS], STOP, EOS),
        ([5, EOS, 6], {"ignore_eos": True}, [5, EOS, 6], LENGTH, None),
        ([5, 6, 7], {"stop_token_ids": (6,)}, [5, 6], STOP, 6),
        ([EOS, EOS, 6], {"min_tokens": 1}, [EOS, EOS], STOP, EOS),
        ([5, 6, 7, 8], {}, [5, 6, 7], LENGTH, None),
    ],
    ids=["eos", "ignore_eos", "stop_token_ids", "min_tokens", "max_tokens"],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_what_ends_a_stream_and_nothing_after_it(
    made: list[int],
    params: dict[str, object],
    shown: list[int],
    reason: FinishReason,
    stop_token: int | None,
    at_once: bool,
) -> None:
    """A row may make several tokens; those after the end are surplus."""
    worker = Worker()
    worker.hear(decode(max_tokens=3, **params))  # type: ignore[arg-type]
    steps = [made] if at_once else [[token] for token in made]
    while worker.plans:
        worker.step(*steps.pop(0))
    assert worker.output() == shown
    assert (worker.said[-1].finish_reason, worker.said[-1].stop_token) == (reason, stop_token)


def test_a_stream_without_a_token_ends_with_the_reason_of_the_device(worker: Worker) -> None:
    """And is tried nowhere else."""
    barred = Problem(code=ErrorCode.INVALID_VALUE, message="Every token is barred.")
    nothing = Problem(code=ErrorCode.INTERNAL, message="The model made no token.")
    for problem, told in ((barred, barred), (None, nothing)):
        worker.hear(decode(max_tokens=3))
        (plan,) = worker.plans
        worker.plans = []
        worker.handle(m.BatchDone(plan.step, (m.RowOutput("r", 1, (), problem=problem),), {}))
        failure = AttemptFailed(request_id="r", attempt=1, cause="no_token", problem=told)
        assert worker.to(SCHEDULER) == [failure]
        assert worker.held == 0 and not worker.machine.jobs


def test_the_context_ends_a_stream() -> None:
    worker = Worker(max_model_len=45)
    worker.hear(decode(prompt=PROMPT, max_tokens=100, ignore_eos=True))
    worker.run()
    assert len(worker.output()) == 5 and worker.said[-1].finish_reason is LENGTH


def test_a_later_attempt_goes_on_after_the_accepted_tokens(worker: Worker) -> None:
    message = decode(prompt=PROMPT, max_tokens=10, ignore_eos=True)
    tokens, _ = answer(message)
    worker.hear(message)
    worker.step()
    again = decode(prompt=PROMPT, attempt=2, accepted=tokens[:4], max_tokens=10, ignore_eos=True)
    worker.hear(again)
    job = worker.machine.jobs["r"]
    for said in (again, message):
        worker.hear(said)
    assert worker.machine.jobs == {"r": job} and job.attempt == 2
    worker.said = []
    told = worker.run()
    assert told == [
        FirstToken(request_id="r", attempt=2, cached_tokens=32),
        Finished(request_id="r", attempt=2),
    ]
    assert (worker.said[0].attempt, worker.said[0].position) == (2, 4)
    assert tokens[:4] + [t for span in worker.said for t in unpack_tokens(span.tokens)] == tokens


@pytest.mark.parametrize(
    ("message", "code", "numbers"),
    [
        (decode(prompt=[1] * 30, max_tokens=70), ErrorCode.CONTEXT_LENGTH, ("64", "30", "70")),
        (prefill(prompt=[64]), ErrorCode.INVALID_VALUE, ("0", "64")),
        (decode(prompt=[], source="prefill-0"), ErrorCode.INVALID_VALUE, ("0", "64")),
    ],
)
def test_what_can_run_nowhere_is_refused_with_the_reason(
    message: Decode | Prefill, code: ErrorCode, numbers: tuple[str, ...]
) -> None:
    worker = Worker(num_blocks=4)
    worker.hear(message)
    (said,) = worker.to(SCHEDULER)
    assert isinstance(said, AttemptFailed) and said.problem is not None
    assert said.problem.code is code
    assert all(number in said.problem.message for number in numbers)
    assert not worker.machine.jobs and not worker.plans


def test_a_failed_step_ends_its_attempts_and_the_worker_goes_on(worker: Worker) -> None:
    worker.hear(decode("r", PROMPT))
    worker.hear(decode("waiting", PROMPT, max_tokens=1))
    worker.fail_step("out of memory")
    assert worker.to(SCHEDULER) == [failed("step: out of memory")], "elsewhere it may go on"
    assert worker.run()[-1] == Finished(request_id="waiting", attempt=1)
    assert worker.load["attempts_failed_step_total"] == 1 and worker.held == 0


def test_a_row_without_a_token_ends_its_request(worker: Worker) -> None:
    worker.hear(decode("r"))
    (plan,) = worker.plans
    worker.handle(m.BatchDone(plan.step, (m.RowOutput("r", 1, ()),), {}))
    (said,) = worker.to(SCHEDULER)
    assert isinstance(said, AttemptFailed) and said.problem is not None
    assert said.problem.code is ErrorCode.INTERNAL and worker.held == 0


def test_a_dropped_stream_says_nothing_more(worker: Worker) -> None:
    worker.hear(decode("r", PROMPT, attempt=2))
    worker.hear(Drop(request_id="r", attempt=1))
    assert worker.machine.jobs, "an older attempt's"
    worker.hear(Drop(request_id="r", attempt=2))
    worker.hear(Drop(request_id="r", attempt=2))
    assert worker.held == 3, "the step still writes there"
    worker.step()
    assert worker.held == 0 and worker.said == [] and worker.sent == []


def test_what_takes_too_long_is_ended_by_the_worker_only_after_the_scheduler(
    worker: Worker,
) -> None:
    worker.hear(decode("r", PROMPT))  # 100 s
    said = worker.pass_time(100.0 + DEADLINE_SLACK_S)
    assert not any(isinstance(message, AttemptFailed) for message in said)
    assert failed("deadline") in worker.pass_time(0.5)


# --- What tokenizers hear -------------------------------------------------------------------------


def test_the_end_is_kept_until_it_is_acknowledged(worker: Worker) -> None:
    message = decode(max_tokens=3, ignore_eos=True)
    worker.hear(message)
    worker.run()
    worker.said = []
    worker.hear(Resend(request_id="r", attempt=1, position=1), TOKENIZER)
    assert [span.position for span in worker.said] == [1]
    worker.hear(Resend(request_id="r", attempt=2, position=0), TOKENIZER)
    assert len(worker.said) == 1, "another attempt"
    worker.said = []
    worker.handle(m.PeerUp(TOKENIZER, 1))
    assert (worker.said[-1].position, worker.output()) == (0, answer(message)[0])
    worker.hear(StreamAck(request_id="r", attempt=1), TOKENIZER)
    worker.said = []
    worker.handle(m.PeerUp(TOKENIZER, 1))
    assert worker.said == [] and not worker.machine.log.ended


def test_a_running_stream_is_repeated_to_its_tokenizer_alone(worker: Worker) -> None:
    worker.hear(decode(ignore_eos=True))
    worker.step()
    worker.said = []
    worker.handle(m.PeerUp("tokenizer-1", 1))
    assert worker.said == []
    worker.handle(m.PeerUp(TOKENIZER, 1))
    assert [(span.position, len(span.tokens) // 4) for span in worker.said] == [(0, 1)]


def test_an_end_that_nobody_hears_is_handed_back(worker: Worker) -> None:
    worker.hear(decode(max_tokens=1))
    worker.run()
    assert failed("unheard") not in worker.pass_time(LOG_KEEP_S - 1)
    assert failed("unheard") in worker.pass_time(1.5)
    assert not worker.machine.log.ended


# --- Reports --------------------------------------------------------------------------------------


def test_what_the_index_claimed_wrongly_is_counted(worker: Worker) -> None:
    worker.hear(decode("a", PROMPT, max_tokens=1))
    worker.run()
    worker.hear(decode("b", PROMPT, claimed=2))
    assert worker.load["index_claims_wrong_total"] == 0
    worker.hear(decode("c", PROMPT[::-1], claimed=2))
    assert worker.load["index_claims_wrong_total"] == 2
    assert worker.load["index_claims_total"] == 4


def test_what_the_executor_counts_goes_out_with_the_load(worker: Worker) -> None:
    worker.handle(m.Counted({"tier_host_blocks": 3.0}))
    worker.handle(m.Counted({"tier_host_blocks": 4.0}))
    (load,) = [said for said in worker.pass_time(0.6) if isinstance(said, WorkerLoad)]
    assert load.counters["tier_host_blocks"] == 4.0 and "preemptions_total" in load.counters


def test_the_index_is_answered_about_this_process_only(worker: Worker) -> None:
    worker.hear(Peers(nodes=[node_info("kvindex-0")]))
    (first,) = worker.to("kvindex-0")
    assert isinstance(first, Snapshot)
    worker.hear(SnapshotRequest(epoch=EPOCH - 1), "kvindex-0")
    assert worker.sent == []
    worker.hear(SnapshotRequest(epoch=EPOCH), "kvindex-0")
    (second,) = worker.to("kvindex-0")
    assert second == msgspec.structs.replace(first, seq=first.seq + 1)


def test_a_full_pool_preempts_and_every_answer_is_right() -> None:
    worker = Worker(num_blocks=6)
    messages = [
        decode(f"r{n}", [n + 1] * (BLOCK_TOKENS - 1), max_tokens=40, ignore_eos=True)
        for n in range(3)
    ]
    for message in messages:
        worker.hear(message)
    worker.run()
    assert worker.load["preemptions_total"] > 0
    for message in messages:
        spans = [span for span in worker.said if span.request_id == message.request_id]
        tokens = [token for span in spans for token in unpack_tokens(span.tokens)]
        assert tokens == answer(message)[0]


# --- Draining -------------------------------------------------------------------------------------


def test_an_idle_worker_leaves_at_once(worker: Worker) -> None:
    worker.handle(m.Drain())
    assert worker.exits


def test_a_shift_of_role_leaves_what_runs() -> None:
    worker = Worker("prefill-0", accept_decode=False)
    worker.hear(prefill(prompt=PROMPT, max_tokens=3))
    worker.hear(ShiftRole(accept_decode=True))
    (said,) = worker.to(SCHEDULER)
    assert isinstance(said, Hello) and said.node.worker is not None
    assert said.node.worker.accept_decode and said.node.worker.shifted
    assert [live.request_id for live in said.live] == ["r"]
    worker.hear(ShiftRole(accept_decode=True))
    assert worker.to(SCHEDULER) == [], "said before"
    worker.hear(ShiftRole(accept_decode=False))
    (said,) = worker.to(SCHEDULER)
    assert isinstance(said, Hello) and said.node.worker is not None
    assert not said.node.worker.shifted, "home again"
    assert worker.machine.jobs
