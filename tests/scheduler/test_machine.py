"""A request's way through the scheduler, from its submission to its end."""

import msgspec
import pytest

from scheduler.rig import (
    DECODE,
    PREFILL,
    TOKENIZER,
    WORKING,
    Rig,
    drop,
    node,
    resume,
    submit,
)
from slipstream.core.machine import Drain
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    AttemptFailed,
    ClusterLoad,
    Decode,
    Drop,
    Failed,
    Finished,
    Hello,
    LiveRequest,
    Located,
    Peers,
    Prefill,
    Resume,
    Started,
    StepSample,
    StreamEnded,
    Submit,
    TransferSample,
    WorkerLoad,
)
from slipstream.scheduler.machine import ORPHAN_GRACE_S
from slipstream.types import ATTEMPTS_PER_MOVE, ATTEMPTS_PER_OWNER

STARTED = Started(request_id="r", attempt=1)
FINISHED = Finished(request_id="r", attempt=1)
ENDED = StreamEnded(request_id="r")


def broken(attempt: int = 1, cause: str = "step", problem: Problem | None = None) -> AttemptFailed:
    return AttemptFailed(request_id="r", attempt=attempt, cause=cause, problem=problem)


@pytest.fixture
def rig() -> Rig:
    return Rig(*WORKING)


@pytest.fixture
def running(rig: Rig) -> Rig:
    """`r` is at both of its workers."""
    rig.submit()
    assert [to for to, _ in rig.sent] == [DECODE, PREFILL]
    return rig


def decoding(rig: Rig) -> Rig:
    rig.submit()
    rig.hear(DECODE, STARTED)
    return rig


# --- The way --------------------------------------------------------------------------------------


def test_from_submission_to_end(rig: Rig) -> None:
    rig.submit()
    assert rig.state() == "prefilling"
    assert (rig.one(Decode)[0], rig.one(Prefill)[0]) == (DECODE, PREFILL)
    rig.hear(DECODE, STARTED)
    assert rig.state() == "decoding" and rig.machine.requests["r"].workers == {DECODE}
    rig.hear(DECODE, FINISHED)
    assert rig.state() == "finishing" and rig.sent == []
    rig.hear(TOKENIZER, ENDED)
    assert rig.state() == "" and rig.sent == [], "the worker keeps the tokens until they are heard"
    assert (rig.count("requests_accepted_total"), rig.count("requests_ended_total")) == (1, 1)


def test_a_stream_that_its_first_token_ends_is_withdrawn_from_the_reader(running: Rig) -> None:
    running.hear(PREFILL, FINISHED)
    assert running.sent == drop(DECODE)
    assert running.state() == "finishing" and running.machine.requests["r"].workers == {PREFILL}


@pytest.mark.parametrize("said", [(), (STARTED,)], ids=["prefilling", "decoding"])
def test_a_stream_that_its_tokenizer_ends_is_dropped(
    running: Rig, said: tuple[Started, ...]
) -> None:
    for message in said:
        running.hear(DECODE, message)
    running.hear("tokenizer-9", ENDED)
    assert running.state() and running.sent == [], "not its own"
    running.hear(TOKENIZER, ENDED)
    assert running.sent == drop(DECODE, *(() if said else (PREFILL,)))
    assert running.state() == ""


def test_it_waits_for_workers_and_then_goes(rig: Rig) -> None:
    rig.lose(DECODE)
    rig.submit()
    assert rig.state() == "queued" and not rig.all(Prefill)
    rig.join(node("decode-1"))
    assert rig.state() == "prefilling" and rig.one(Decode)[0] == "decode-1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PREFILL, STARTED),
        ("decode-9", STARTED),
        (DECODE, Started(request_id="r", attempt=2)),
        ("decode-9", FINISHED),
        (DECODE, Finished(request_id="r", attempt=2)),
        ("decode-9", broken()),
        (DECODE, broken(attempt=2)),
        (DECODE, Located(request_id="r", attempt=1, blocks={DECODE: 1})),
        ("decode-9", Hello(node=node("decode-8"))),
        (TOKENIZER, submit()),
        (TOKENIZER, StreamEnded(request_id="other")),
    ],
)
def test_old_strange_and_repeated_words_change_nothing(
    running: Rig, source: str, message: Submit
) -> None:
    before = running.machine.statistics()
    running.hear(source, message)
    assert running.sent == [] and running.machine.statistics() == before


# --- Refusals -------------------------------------------------------------------------------------


def test_a_full_house_says_when_to_come_back() -> None:
    rig = Rig(*WORKING, max_requests=2)
    rig.submit("a")
    rig.submit("b")
    rig.submit("r")
    problem = rig.problem()
    assert problem.code is ErrorCode.QUEUE_FULL and problem.retry_after_s == 5.0
    assert "2 requests are live, the limit is 2" in problem.message and rig.state() == ""
    rig.submit("begun", accepted=3)
    assert rig.state("begun") == "queued" or rig.all(Decode), "what has begun is always taken"
    rig.hear(TOKENIZER, StreamEnded(request_id="a"))
    rig.hear(TOKENIZER, StreamEnded(request_id="b"))
    rig.submit("r")
    assert rig.state() == "prefilling"
    assert rig.count("requests_refused_queue_full_total") == 1


def test_the_queue_is_bounded_in_tokens() -> None:
    rig = Rig(TOKENIZER, max_queued_tokens=100)  # nobody computes: all of them wait
    rig.submit("alone", prompt=150, max_tokens=1)
    assert rig.state("alone") == "queued", "however long it is, for nothing else waits"
    rig.submit("r", prompt=1)
    problem = rig.problem()
    assert problem.code is ErrorCode.QUEUE_FULL and problem.retry_after_s is not None
    assert "Prompts of 150 tokens wait, the limit is 100" in problem.message
    rig.submit("begun", accepted=3)
    assert rig.state("begun") == "queued", "what has begun is always taken"
    rig.hear(TOKENIZER, StreamEnded(request_id="alone"))
    rig.submit("r", prompt=70)
    assert rig.state() == "queued" and rig.count("queued_tokens") == 93


def test_what_no_pool_holds_is_refused_with_both_numbers(rig: Rig) -> None:
    rig.submit(prompt=200, max_tokens=56)
    assert rig.state() == "prefilling"
    rig.submit("large", prompt=200, max_tokens=57)
    problem = rig.problem()
    assert problem.code is ErrorCode.CONTEXT_LENGTH
    assert "17 KV blocks" in problem.message and "has 16" in problem.message
    rig.submit("begun", 5, accepted=3, prompt=200, max_tokens=57)
    assert rig.state("begun") == "queued", "somebody held it, and may come back"


def test_who_drains_takes_nothing_new_and_leaves_when_all_is_done(running: Rig) -> None:
    running.handle(Drain())
    assert not running.exits
    running.submit("new")
    assert running.problem().code is ErrorCode.DRAINING
    running.hear(DECODE, STARTED)
    running.hear(DECODE, FINISHED)
    assert not running.exits
    running.hear(TOKENIZER, ENDED)
    assert running.exits


# --- Time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "said", "state", "told"),
    [
        ((TOKENIZER,), (), "queued", ()),
        (WORKING, (), "prefilling", (DECODE, PREFILL)),
        (WORKING, (STARTED,), "decoding", (DECODE,)),
        (WORKING, (STARTED, FINISHED), "finishing", (DECODE,)),
        (WORKING, (broken(),), "resuming", ()),
    ],
)
def test_a_deadline_ends_it_wherever_it_is(
    nodes: tuple[str, ...], said: tuple[Submit, ...], state: str, told: tuple[str, ...]
) -> None:
    rig = Rig(*nodes, recovery_wait_s=100.0)
    rig.submit(timeout_s=30.0)
    for message in said:
        rig.hear(DECODE, message)
    rig.pass_time(29.9)
    assert rig.state() == state
    rig.pass_time(0.5)
    problem = rig.problem()
    assert problem.code is ErrorCode.DEADLINE and f"used up; it was {state}" in problem.message
    assert rig.all(Drop) == drop(*told) and rig.state() == ""


def test_nobody_may_ask_for_more_than_the_longest_time() -> None:
    rig = Rig(*WORKING, max_request_timeout_s=10.0)
    rig.submit(timeout_s=1000.0)
    assert rig.one(Decode)[1].timeout_s == 10.0


def test_a_stream_outlives_its_tokenizer_for_a_while(rig: Rig) -> None:
    decoding(rig).lose(TOKENIZER)
    rig.pass_time(ORPHAN_GRACE_S - 0.1)
    assert rig.state() == "decoding"
    rig.submit(repeated=True)
    assert rig.sent == [], "it runs on"
    rig.pass_time(ORPHAN_GRACE_S)
    assert rig.state() == "decoding"
    rig.lose("tokenizer-9")
    rig.join(node(TOKENIZER))
    rig.lose(TOKENIZER)
    rig.pass_time(ORPHAN_GRACE_S + 0.5)
    assert rig.state() == "" and rig.all(Drop) == drop(DECODE)
    assert rig.count("requests_orphaned_total") == 1


def test_frontends_hear_the_gauges_once_a_second(running: Rig) -> None:
    running.join(node("frontend-0"))
    running.join(node("frontend-1", draining=True))
    blocks = {f"blocks_{name}": 4 for name in ("free", "used", "cached", "leased")}
    load = WorkerLoad(steps=7, running=1, waiting=0, waiting_tokens=0, **blocks)
    load = msgspec.structs.replace(load, blocks_from={PREFILL: 3})
    running.hear(DECODE, load)
    running.hear("decode-9", load)
    running.pass_time(3.0)
    said = running.all(ClusterLoad)
    assert [to for to, _ in said] == ["frontend-0"] * 3
    gauges = said[-1][1].gauges
    assert gauges.keys() == {DECODE, "scheduler"}
    assert gauges[DECODE]["steps"] == 7 and gauges["scheduler"]["requests_prefilling"] == 1
    assert said[-1][1].blocks_from == {DECODE: {PREFILL: 3}}


# --- Retries --------------------------------------------------------------------------------------


def test_a_lost_worker_moves_its_requests(running: Rig) -> None:
    running.join(node("decode-1"))
    running.lose(DECODE)
    assert running.all(Drop) == drop(PREFILL)
    assert running.one(Resume) == resume(2) and running.state() == "resuming"
    assert all(DECODE in peers.gone for _, peers in running.all(Peers))
    running.submit(attempt=2, accepted=4)
    to, decode = running.one(Decode)
    assert (to, decode.attempt, len(decode.accepted)) == ("decode-1", 2, 16)
    running.hear(DECODE, STARTED)
    assert running.state() == "prefilling", "an old attempt's word"


def test_a_lost_prefill_worker_is_no_matter_once_the_stream_runs(rig: Rig) -> None:
    decoding(rig).lose(PREFILL)
    assert rig.state() == "decoding" and not rig.all(Resume)


def test_an_end_that_nobody_heard_dies_with_its_worker(rig: Rig) -> None:
    decoding(rig).hear(DECODE, FINISHED)
    rig.lose(DECODE)
    assert rig.one(Resume) == resume(2) and rig.state() == "resuming"


def test_a_failed_attempt_is_followed_by_the_next(running: Rig) -> None:
    running.hear(PREFILL, broken())
    assert running.sent == [*drop(DECODE, PREFILL), resume(2)]
    running.hear(PREFILL, broken())
    assert running.sent == [], "once"


def test_what_can_go_on_nowhere_ends(running: Rig) -> None:
    problem = Problem(code=ErrorCode.INVALID_VALUE, message="No such token.")
    running.hear(DECODE, broken(problem=problem))
    assert running.problem() == problem and running.state() == ""
    assert running.all(Drop) == drop(DECODE, PREFILL)


@pytest.mark.parametrize("limit", [0, 2])
def test_a_request_that_every_worker_fails_ends(limit: int) -> None:
    rig = Rig(*WORKING, max_migrations=limit)
    for attempt in range(1, limit + 2):
        assert rig.state() in ("", "resuming")
        rig.submit(attempt=attempt)
        rig.hear(DECODE, broken(attempt, cause="unheard: by nobody"))
    problem = rig.problem()
    assert problem.code is ErrorCode.MIGRATIONS and rig.state() == ""
    assert all(
        text in problem.message for text in (f"{limit + 1} workers", f"is {limit} ", "unheard:")
    )


def test_workers_that_leave_in_order_have_not_failed_it() -> None:
    rig = Rig(TOKENIZER, *(f"decode-{number}" for number in range(6)), disaggregation="never")
    rig.submit()
    for attempt in range(1, 6):
        (worker, _) = rig.one(Decode)
        rig.join(node(worker, draining=True))
        rig.lose(worker)
        assert rig.one(Resume)[1].attempt == attempt + 1
        rig.submit(attempt=attempt + 1, accepted=attempt)
    assert rig.state() == "decoding" and rig.machine.requests["r"].migrations == 5


def test_a_reader_whose_source_left_in_order_has_not_been_failed() -> None:
    rig = Rig(*WORKING, "prefill-1", max_migrations=0)
    rig.submit()
    source = rig.machine.requests["r"].prefill
    assert source is not None
    rig.join(node(source, draining=True))
    rig.hear(DECODE, AttemptFailed(request_id="r", attempt=1, cause="prefill_lost"))
    assert rig.state() == "resuming" and not rig.all(Failed)


def test_what_waits_for_a_worker_that_does_not_come_back_ends() -> None:
    rig = Rig(*WORKING)
    rig.submit("begun")
    rig.lose(DECODE)
    rig.submit("begun", 2, accepted=3)
    rig.submit("fresh")
    rig.pass_time(29.0)
    assert rig.all(Failed) == [] and rig.state("fresh") == "queued"
    rig.pass_time(2.0)
    ended = {failed.request_id: failed.problem for _, failed in rig.all(Failed)}
    assert {problem.code for problem in ended.values()} == {ErrorCode.NO_WORKER}
    assert ended.keys() == {"begun", "fresh"}
    rig.join(node(DECODE, epoch=2))
    rig.submit("next")
    assert rig.state("next") == "prefilling"
    rig.pass_time(20.0)
    assert rig.all(Failed) == []


def test_what_only_a_larger_worker_could_hold_waits_for_it_and_holds_up_nobody() -> None:
    rig = Rig(TOKENIZER, DECODE, disaggregation="never", recovery_wait_s=30.0)
    for name in ("comes back", "ends"):
        rig.submit(name, max_tokens=200)
    rig.lose(DECODE)
    rig.join(node("decode-1", num_blocks=4))
    rig.submit("comes back", 2, accepted=50, max_tokens=200)
    rig.submit("short")
    assert rig.state("short") == "decoding" and rig.state("comes back") == "queued"
    rig.pass_time(29.0)
    rig.join(node(DECODE, epoch=2, max_num_seqs=1))
    assert rig.one(Decode)[0] == DECODE and rig.state("comes back") == "decoding"
    rig.pass_time(1.0)
    rig.lose(DECODE)
    rig.submit("ends", 2, max_tokens=200)
    rig.pass_time(29.0)
    assert rig.state("ends") == "queued"
    rig.pass_time(2.0)
    assert rig.problem().code is ErrorCode.NO_WORKER
    assert "no worker that holds the 220 tokens of one request" in rig.problem().message


def test_attempts_never_run_into_those_of_the_next_move() -> None:
    rig = Rig(*WORKING, max_migrations=100)
    rig.submit(attempt=ATTEMPTS_PER_MOVE - 1)
    rig.hear(DECODE, broken(ATTEMPTS_PER_MOVE - 1))
    assert rig.problem().code is ErrorCode.MIGRATIONS


# --- Submissions again ----------------------------------------------------------------------------


def test_a_tokenizer_that_missed_the_news_hears_it_again(running: Rig) -> None:
    running.hear(DECODE, broken())
    running.submit(repeated=True)
    assert running.sent == [resume(2)] and running.state() == "resuming"
    assert running.count("requests_migrated_total") == 1


def test_a_tokenizer_that_fell_behind_begins_a_new_attempt(running: Rig) -> None:
    running.hear(DECODE, broken())
    running.submit(attempt=2)
    running.submit(attempt=1, repeated=True)
    assert running.sent == [*drop(DECODE, PREFILL, attempt=2), resume(3)]


def test_of_two_tokenizers_with_one_stream_the_later_one_counts(running: Rig) -> None:
    moved = ATTEMPTS_PER_MOVE
    running.submit(attempt=moved, accepted=2, source="tokenizer-1")
    assert running.all(Drop) == drop(DECODE, PREFILL)
    assert running.one(Decode)[1].tokenizer == "tokenizer-1"
    for attempt in (1, 2):
        running.submit(attempt=attempt, repeated=True)
        assert running.sent == [], "the frontend has moved away from there"
    running.hear(TOKENIZER, ENDED)
    assert running.state() == "prefilling"
    running.hear(DECODE, broken(moved))
    assert running.one(Resume) == resume(moved + 1, to="tokenizer-1")


def test_a_stream_is_its_latest_owners(running: Rig) -> None:
    """What runs goes on; a frontend from which it was taken cannot move it."""
    running.submit(repeated=True, owner=1)
    assert running.sent == []
    running.submit(attempt=ATTEMPTS_PER_MOVE, accepted=2, source="tokenizer-1")
    assert running.sent == []
    running.hear(DECODE, broken(1))
    assert running.one(Resume) == resume(2)
    taken = ATTEMPTS_PER_OWNER * 2
    running.submit(attempt=taken, accepted=2, owner=2, source="tokenizer-1")
    assert running.all(Prefill)
    running.submit(attempt=2, accepted=2, owner=1)
    assert running.sent == []


def test_what_has_ended_well_is_not_run_again_under_the_same_number(running: Rig) -> None:
    running.hear(TOKENIZER, ENDED)
    running.submit(repeated=True)
    assert running.sent == [resume(2)] and running.state() == ""
    running.submit(attempt=2)
    assert running.state() == "prefilling"


def test_what_has_failed_fails_again_in_the_same_words(rig: Rig) -> None:
    rig.submit(timeout_s=1.0)
    rig.pass_time(2.0)
    problem = rig.problem()
    rig.submit(repeated=True)
    assert rig.sent == [(TOKENIZER, Failed(request_id="r", problem=problem))]
    rig.pass_time(61.0)
    rig.submit()
    assert rig.state() == "prefilling", "nobody remembers"


def test_a_finished_stream_that_its_tokenizer_has_forgotten_runs_again(rig: Rig) -> None:
    """Its end was lost with a session, and the worker has let its tokens go."""
    decoding(rig)
    rig.hear(DECODE, FINISHED)
    rig.hear(TOKENIZER, submit(repeated=True))
    assert rig.state() == "finishing", "it still has the stream: the worker says its tokens again"
    rig.hear(TOKENIZER, submit())
    assert resume(2) in rig.sent and rig.state() == "resuming"
    rig.hear(TOKENIZER, submit(attempt=2))
    assert rig.state() == "prefilling"


def load_with(**samples: object) -> WorkerLoad:
    return WorkerLoad(
        steps=1,
        running=0,
        waiting=0,
        waiting_tokens=0,
        blocks_free=16,
        blocks_used=0,
        blocks_cached=0,
        blocks_leased=0,
        **samples,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("elapsed_s", [float("inf"), float("nan"), 1e300, -1.0, 0.0])
def test_an_absurd_measurement_is_not_believed(rig: Rig, elapsed_s: float) -> None:
    load = load_with(
        step_samples=[StepSample(100, 10_000, 1, 10, elapsed_s)] * 9,
        transfer_samples=[TransferSample(PREFILL, "shm", 4, elapsed_s)] * 9,
    )
    for _ in range(3):
        rig.hear(DECODE, load)
        rig.hear(PREFILL, load)
    rig.submit()
    assert rig.state() == "prefilling"


def test_how_two_workers_reach_each_other_is_known_while_both_are_there(rig: Rig) -> None:
    ways = [TransferSample(PREFILL, "bus", 4, 1.0), TransferSample(PREFILL, "shm", 4, 1e-3)]
    transfers = rig.machine.dispatcher.transfers

    def price_s() -> float:
        return transfers.read_s(DECODE, PREFILL, 4)

    best_s = price_s()
    for _ in range(9):
        rig.hear(DECODE, load_with(transfer_samples=ways[1:]))
        rig.hear(DECODE, load_with(transfer_samples=ways[:1]))
    assert price_s() > 10 * best_s, "by bus"
    rig.lose(PREFILL)
    assert price_s() < best_s
    rig.hear(DECODE, load_with(transfer_samples=ways[:1]))
    assert price_s() < best_s, "told after it had gone"


def test_who_is_no_worker_reports_nothing_that_runs(rig: Rig) -> None:
    young = Rig(young=True)
    young.join(node("frontend-3"), LiveRequest("r", 1))
    young.submit(repeated=True)
    assert young.state() == "recovering"
