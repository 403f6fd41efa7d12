"""Requests that kill workers: found after two, and nobody else pays for it."""

import pytest

from scheduler.rig import DECODE, TOKENIZER, Rig, node
from slipstream.errors import ErrorCode
from slipstream.messages import (
    AttemptFailed,
    Failed,
    FirstToken,
    Resume,
    Started,
    StreamEnded,
    WorkerLoad,
)
from slipstream.scheduler.suspects import SILENT_S

WORKERS = tuple(f"decode-{number}" for number in range(6))


REPORT = WorkerLoad(
    **dict.fromkeys(("steps", "running", "waiting", "waiting_tokens"), 0),
    **dict.fromkeys(("blocks_free", "blocks_used", "blocks_cached", "blocks_leased"), 0),
)


@pytest.fixture
def rig() -> Rig:
    return Rig(TOKENIZER, *WORKERS, disaggregation="never", max_migrations=10)


def where(rig: Rig, request_id: str) -> str:
    decode = rig.machine.requests[request_id].decode
    assert decode is not None
    return decode


def dies(rig: Rig, worker: str, **tokens: int) -> dict[str, ErrorCode | None]:
    """A worker does; what becomes of its requests. They are submitted again, with `tokens`."""
    rig.lose(worker)
    ended = {failed.request_id: failed.problem.code for _, failed in rig.all(Failed)}
    resumed = {resume.request_id: resume.attempt for _, resume in rig.all(Resume)}
    for request_id, attempt in resumed.items():
        rig.submit(request_id, attempt, accepted=tokens.get(request_id, 0))
    return ended | dict.fromkeys(resumed)


def speaks(rig: Rig, request_id: str) -> None:
    attempt = rig.machine.requests[request_id].attempt
    rig.hear(where(rig, request_id), FirstToken(request_id=request_id, attempt=attempt))


def test_a_stream_that_runs_has_had_a_token_whoever_says_so_first() -> None:
    """Two senders: the word of the first token may come behind that of the stream's beginning."""
    rig = Rig(TOKENIZER, "prefill-0", "decode-0", "decode-1", disaggregation="always")
    rig.submit("r")
    for attempt in (1, 2):
        worker = where(rig, "r")
        rig.hear(worker, Started(request_id="r", attempt=attempt))
        rig.hear("prefill-0", FirstToken(request_id="r", attempt=attempt))
        assert dies(rig, worker, r=attempt) == {"r": None}


def test_who_is_lost_twice_without_a_token_is_not_tried_a_third_time(rig: Rig) -> None:
    rig.submit("bad")
    assert dies(rig, where(rig, "bad")) == {"bad": None}
    assert dies(rig, where(rig, "bad")) == {"bad": ErrorCode.QUARANTINED}
    assert rig.state("bad") == ""
    rig.submit("bad", 2)
    assert rig.problem().code is ErrorCode.QUARANTINED, "nor if it is said again"


def test_a_worker_that_was_silent_before_it_was_told_accuses_nobody(rig: Rig) -> None:
    """All workers die at once. The request is sent from one to the next, until they are known
    to be dead."""
    for worker in WORKERS:
        rig.hear(worker, REPORT)
    rig.submit("any")
    rig.pass_time(SILENT_S)
    assert dies(rig, where(rig, "any")) == {"any": None}, "its first loss, which counts"
    for _ in range(3):
        assert dies(rig, where(rig, "any")) == {"any": None}
    (last,) = {*rig.machine.fleet.nodes} & {*WORKERS} - {where(rig, "any")}
    rig.hear(last, REPORT)
    assert dies(rig, where(rig, "any")) == {"any": None}
    assert dies(rig, last) == {"any": ErrorCode.QUARANTINED}, "this one has lived when it was told"


def test_who_makes_tokens_in_between_goes_on(rig: Rig) -> None:
    rig.submit("long")
    for tokens in range(1, 6):
        speaks(rig, "long")
        assert dies(rig, where(rig, "long"), long=tokens) == {"long": None}


def test_a_worker_that_leaves_in_order_accuses_nobody(rig: Rig) -> None:
    rig.submit("any")
    for _ in range(3):
        worker = where(rig, "any")
        rig.join(node(worker, draining=True))
        assert dies(rig, worker) == {"any": None}


@pytest.fixture
def crowd() -> Rig:
    """One worker after the other, so that all requests are always together."""
    return Rig(TOKENIZER, DECODE, disaggregation="never", max_migrations=10)


def crash(rig: Rig) -> dict[str, ErrorCode | None]:
    epoch = rig.machine.fleet.nodes[DECODE].epoch
    ended = dies(rig, DECODE)
    rig.join(node(DECODE, epoch + 1))
    return ended


def test_of_several_suspects_one_runs_at_a_time_and_the_next_loss_tells(crowd: Rig) -> None:
    for name in ("good", "bad"):
        crowd.submit(name)
    assert crash(crowd) == {"good": None, "bad": None}
    assert crash(crowd) == {"good": None, "bad": None}, "either may have done it"
    assert crowd.state("good") == "decoding" and crowd.state("bad") == "probation"
    speaks(crowd, "good")
    assert crowd.state("bad") == "decoding", "its turn"
    assert crash(crowd) == {"good": None, "bad": ErrorCode.QUARANTINED}
    assert crowd.state("good") == "decoding", "it has made a token since"


def test_who_waits_has_its_turn_when_the_other_is_over(crowd: Rig) -> None:
    for name in ("one", "two", "three"):
        crowd.submit(name)
    crash(crowd)
    crash(crowd)
    crowd.hear(TOKENIZER, StreamEnded(request_id="two"))
    crowd.hear(TOKENIZER, StreamEnded(request_id="one"))
    assert crowd.state("three") == "decoding"


def test_whoever_comes_meanwhile_is_not_held_up(crowd: Rig) -> None:
    for name in ("one", "two"):
        crowd.submit(name)
    crash(crowd)
    crash(crowd)
    crowd.submit("new")
    assert crowd.state("new") == "decoding"


@pytest.mark.parametrize(("beside", "code"), [(0, ErrorCode.QUARANTINED), (1, None)])
def test_a_step_that_fails_twice_accuses_whoever_was_alone_in_it(
    rig: Rig, beside: int, code: ErrorCode | None
) -> None:
    rig.submit("bad")
    for attempt in (1, 2):
        failed = AttemptFailed(request_id="bad", attempt=attempt, cause="step: x", beside=beside)
        rig.hear(where(rig, "bad"), failed)
        found = [failed.problem.code for _, failed in rig.all(Failed)]
        if not found:
            rig.submit("bad", attempt + 1)
    assert found == ([code] if code else [])


def test_a_loss_that_another_worker_tells_of_first_counts() -> None:
    rig = Rig(TOKENIZER, "prefill-0", *WORKERS[:2])
    rig.submit("bad")
    first = where(rig, "bad")
    failed = AttemptFailed(request_id="bad", attempt=1, cause="decode_lost")
    rig.hear("prefill-0", failed)
    rig.submit("bad", 2)
    dies(rig, first)
    assert dies(rig, where(rig, "bad")) == {"bad": ErrorCode.QUARANTINED}
