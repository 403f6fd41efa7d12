"""Requests that would wait for too long are refused before any work."""

import math

import msgspec
import pytest

from scheduler.rig import DECODE, INDEX, TOKENIZER, WORKING, Rig, node, submit
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    Decode,
    Failed,
    FirstToken,
    Located,
    Started,
    StepSample,
    StreamEnded,
    WorkerLoad,
)
from slipstream.scheduler.admission import TIMES_ALONE, Expected, too_late
from slipstream.scheduler.decisions import ERRORS_MAX
from slipstream.scheduler.dispatcher import CAUTION
from slipstream.scheduler.lane import (
    LATE_FRESH_S,
    LATE_KNOWN,
    PACE_KNOWN_S,
    RATE_WINDOW_S,
    RETRY_AFTER_MAX_S,
    Pace,
)
from slipstream.scheduler.prices import KNOWN_WELL

TARGET_S = 5.0


@pytest.mark.parametrize(
    ("expected", "retry_after_s"),
    [
        (Expected(0.0, TARGET_S), None),
        (Expected(1.0, TARGET_S), 1.0),
        (Expected(0.0, 12.0), 7.0),
        (Expected(0.0, 500.0), RETRY_AFTER_MAX_S),
        (Expected(0.0, TIMES_ALONE * 6.0, 6.0), None),
        (Expected(3.0, TIMES_ALONE * 6.0, 6.0), 3.0),
    ],
)
def test_who_comes_back_is_told_when(expected: Expected, retry_after_s: float | None) -> None:
    problem = too_late(expected, TARGET_S)
    if retry_after_s is None:
        assert problem is None
        return
    assert isinstance(problem, Problem) and problem.code is ErrorCode.QUEUE_FULL
    assert problem.retry_after_s == retry_after_s
    assert f"{expected.waited_s + expected.ahead_s:.1f} s" in problem.message
    assert "--ttft-target-s" in problem.message


def test_no_target_no_refusal() -> None:
    assert too_late(Expected(1e6, 1e6), math.inf) is None


def test_the_pace_is_of_the_time_since_all_places_are_taken() -> None:
    pace = Pace()
    for number in range(8):
        pace.ended(100.0 + number)
    assert pace.per_s(100.0, 100.0 + PACE_KNOWN_S / 2) == math.inf
    assert pace.per_s(103.0, 107.0) == pytest.approx((1 + 4) / 4)
    assert pace.per_s(0.0, 107.0) == pytest.approx((1 + 8) / RATE_WINDOW_S)


def test_who_was_refused_says_nothing_of_the_pace() -> None:
    rig = Rig(*WORKING)
    rig.submit("a")
    dispatcher = rig.machine.dispatcher
    request = rig.machine.requests["a"]
    dispatcher.ended(request, Problem(code=ErrorCode.QUEUE_FULL, message="Refused."), rig.now_s)
    assert dispatcher.lane("fake").pace.retry_after_s(rig.now_s) == 5.0, "nothing is known"
    dispatcher.ended(request, None, rig.now_s)
    assert dispatcher.lane("fake").pace.retry_after_s(rig.now_s) == RATE_WINDOW_S


COUNTS = "steps running waiting waiting_tokens blocks_free blocks_used blocks_cached blocks_leased"
SLOW = WorkerLoad(
    **dict.fromkeys(COUNTS.split(), 0),  # type: ignore[arg-type]
    step_samples=[StepSample(n, n * n, 0, 0, elapsed_s=n / 10) for n in (20, 60) * 16],
)
"""A prompt of 20 tokens takes two seconds there."""


class Busy(Rig):
    """Workers with four places."""

    def __init__(self, ttft_target_s: float = TARGET_S, **settings: object):
        super().__init__(*WORKING, ttft_target_s=ttft_target_s, **settings)

    def place(self, *names: str) -> None:
        for name in names:
            self.submit(name)
            self.hear(DECODE, Started(request_id=name, attempt=1))
            assert self.state(name) == "decoding"

    def end(self, name: str) -> None:
        self.hear(TOKENIZER, StreamEnded(request_id=name))

    def refused(self) -> list[str]:
        problems = [failed for _, failed in self.all(Failed)]
        assert all(failed.problem.code is ErrorCode.QUEUE_FULL for failed in problems)
        return [failed.request_id for failed in problems]


def test_nobody_waits_for_a_place_for_longer_than_the_target() -> None:
    rig = Busy()
    rig.place("a", "b", "c", "d")
    rig.submit("e")
    assert rig.state("e") == "queued" and not rig.refused()
    rig.pass_time(TARGET_S - 0.1)
    assert rig.state("e") == "queued"
    rig.pass_time(0.5)
    assert rig.refused() == ["e"] and rig.state("e") == ""
    assert not rig.all(Decode), "no work was done for it"


def test_who_stands_too_far_behind_is_told_at_once() -> None:
    rig = Busy()
    rig.place("a", "b", "c", "d")
    rig.submit("first")
    rig.submit("second")
    rig.pass_time(2.0)
    rig.end("a")
    rig.pass_time(2.0)
    taken = 0
    while not rig.all(Failed):  # one has ended, one is about to: a place in two seconds
        taken += 1
        rig.submit(f"n{taken}")
    assert rig.refused() == [f"n{taken}"] and taken == 3, "behind `second` and two more"
    assert rig.problem().retry_after_s == pytest.approx(3 / (2 / 4) - TARGET_S)


def test_who_would_compute_it_too_late_does_not_begin() -> None:
    rig = Busy(ttft_target_s=CAUTION * 5.0, disaggregation="never")
    learnt(rig)
    rig.submit("a")
    rig.submit("b")
    assert rig.state("a") == rig.state("b") == "decoding", "both within five seconds"
    rig.submit("c")
    assert rig.refused() == ["c"]
    rig.hear(DECODE, FirstToken(request_id="a", attempt=1))
    rig.submit("d")
    assert rig.state("d") == "decoding"


def test_a_prompt_that_takes_long_by_itself_is_taken_when_nothing_else_is_done() -> None:
    rig = Busy(ttft_target_s=0.5, disaggregation="never")
    learnt(rig)
    rig.submit("a")
    assert rig.state("a") == "decoding" and not rig.refused()


def test_what_has_begun_is_not_refused() -> None:
    rig = Busy()
    rig.place("a", "b", "c", "d")
    rig.submit("e", accepted=3, attempt=2)
    rig.pass_time(3 * TARGET_S)
    assert rig.state("e") == "queued" and not rig.refused()


def test_the_index_may_take_its_time() -> None:
    """The wait counts from the submission on."""
    rig = Busy(locate_timeout_s=4.0)
    rig.place("a", "b", "c", "d")
    rig.join(node(INDEX))
    rig.submit("e", hashes=bytes(64))
    rig.pass_time(3.0)
    rig.hear(INDEX, Located(request_id="e", attempt=1, blocks={}))
    assert rig.state("e") == "queued"
    rig.pass_time(2.5)
    assert rig.refused() == ["e"]


def late_by(rig: Rig, late_s: float, count: int = LATE_KNOWN) -> None:
    """So many first tokens, each so long after its prediction; one request at a time."""
    for number in range(count):
        name = f"late-{number}"
        rig.submit(name)
        decision = rig.machine.dispatcher.decisions.latest()[-1][0]
        rig.pass_time(decision.predicted_ttft_s + late_s)
        rig.hear(DECODE, FirstToken(request_id=name, attempt=1))
        rig.end(name)
        rig.hear(DECODE, SLOW)


def learnt(rig: Rig) -> None:
    for _ in range(4):
        rig.hear(DECODE, SLOW)


def test_who_was_late_before_is_expected_late_again() -> None:
    rig = Busy(ttft_target_s=CAUTION * 5.0, disaggregation="never")
    learnt(rig)
    late_by(rig, 4.0)
    rig.submit("a")
    rig.submit("b")
    assert rig.state("b") == "decoding", "4.2 s, and 4.2 s more for caution, or 4 s for lateness"
    rig.end("a")
    rig.end("b")
    rig.hear(DECODE, SLOW)
    late_by(rig, 6.5, ERRORS_MAX)
    rig.submit("c")
    rig.submit("d")
    assert rig.state("c") == "decoding"
    assert rig.refused() == ["d"], "4.2 s and 6.5 s are more than 10"


def test_lateness_is_forgotten_and_never_refuses_by_itself() -> None:
    rig = Busy(disaggregation="never")
    learnt(rig)
    late_by(rig, 7.0)
    rig.submit("a")
    assert rig.state("a") == "decoding", (
        "an idle worker: 2 s, and at most three quarters of the target"
    )
    rig.submit("b")
    assert rig.refused() == ["b"]
    rig.pass_time(LATE_FRESH_S + 1.0)
    rig.submit("c")
    assert rig.state("c") == "decoding"


def test_prices_that_are_not_known_well_refuse_nobody() -> None:
    rig = Busy(disaggregation="never")
    few = StepSample(20, 400, 0, 0, elapsed_s=60.0)
    rig.hear(DECODE, msgspec.structs.replace(SLOW, step_samples=[few] * (KNOWN_WELL - 1)))
    for name in "abc":
        rig.submit(name)
        assert rig.state(name) == "decoding", "a first step may have waited for anything"
    rig.hear(DECODE, msgspec.structs.replace(SLOW, step_samples=[few]))
    rig.submit("d")
    assert rig.refused() == ["d"]


def test_a_request_whose_time_is_up_by_both_clocks_ends_once() -> None:
    """At the same tick it has waited for too long, and its own budget is used up."""
    rig = Busy()
    rig.place("a", "b", "c", "d")
    rig.pass_time(0.1)  # between two ticks
    rig.submit("e", timeout_s=TARGET_S)
    rig.pass_time(TARGET_S + 0.5)
    assert len(rig.all(Failed)) == 1 and rig.state("e") == ""


def test_choices_of_one_call_are_taken_or_refused_together() -> None:
    """One that is refused ends the whole call, and with it the work on the others."""
    rig = Busy()
    names = [f"call-{number}" for number in range(6)]
    for name in names:
        rig.submit(name)
        if rig.state(name) == "prefilling":
            rig.hear(DECODE, Started(request_id=name, attempt=1))
    rig.submit("other-0")
    rig.pass_time(TARGET_S + 1.0)
    assert rig.refused() == ["other-0"]
    assert [rig.state(name) for name in names] == ["decoding"] * 4 + ["queued"] * 2
    for name in names[:4]:
        rig.end(name)
    assert rig.state(names[5]) == "prefilling"


@pytest.mark.parametrize("away_s", [6.0, 20.0])
def test_an_outage_is_no_pace(away_s: float) -> None:
    """Without workers nothing ends, however many wait."""
    rig = Rig(*WORKING, ttft_target_s=30.0, recovery_wait_s=30.0)
    rig.lose(DECODE)
    for number in range(40):
        rig.submit(f"r{number}")
    rig.pass_time(away_s)
    assert not rig.all(Failed)
    rig.join(node(DECODE, epoch=2))
    rig.submit("late")
    rig.pass_time(1.0)
    assert not rig.all(Failed) and rig.state("r0") == "prefilling"


def test_who_waits_for_an_adapter_makes_nobody_late() -> None:
    rig = Rig(*WORKING, ttft_target_s=30.0, recovery_wait_s=60.0)
    for number in range(40):
        asked = msgspec.structs.replace(submit(f"rare{number}"), adapter="a@1")
        rig.hear(TOKENIZER, asked)
    rig.pass_time(20.0)
    assert not rig.all(Failed)
    rig.submit("plain")
    assert rig.state("plain") == "prefilling" and not rig.all(Failed)


def test_who_computed_for_another_tokenizer_is_not_refused() -> None:
    """Its tokenizer died before the first token; the next one submits it anew."""
    rig = Busy()
    rig.place("e")
    rig.pass_time(TARGET_S + 1.0)
    rig.join(node("tokenizer-1"))
    rig.lose(TOKENIZER)
    rig.submit("e", attempt=2, source="tokenizer-1")
    assert rig.state("e") == "prefilling" and not rig.refused()


def test_who_was_there_before_the_scheduler_is_not_refused() -> None:
    rig = Rig(*WORKING, young=True, ttft_target_s=1.0)
    rig.submit("e", repeated=True)
    rig.pass_time(3.0)
    assert rig.state("e") == "resuming", "nobody has said that it runs there"
    rig.submit("e", attempt=2)
    assert rig.state("e") == "prefilling" and not rig.all(Failed)
