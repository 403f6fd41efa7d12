"""A scheduler that begins anew: its requests are where they were, and it has to find them."""

import pytest

from scheduler.rig import DECODE, PREFILL, TOKENIZER, Rig, drop, node, resume
from slipstream.messages import Decode, Drop, LiveRequest, StreamEnded
from slipstream.scheduler.machine import ORPHAN_GRACE_S

RUNS = LiveRequest("r", 1)


@pytest.fixture
def young() -> Rig:
    """It has just begun, and hears from its tokenizer and a prefill worker."""
    return Rig(TOKENIZER, PREFILL, young=True, recovery_grace_s=2.0)


@pytest.mark.parametrize("worker_first", [True, False])
def test_what_runs_is_adopted(young: Rig, worker_first: bool) -> None:
    if worker_first:
        young.join(node(DECODE), RUNS)
        young.submit(repeated=True)
    else:
        young.submit(repeated=True)
        assert young.state() == "recovering" and young.sent == []
        young.join(node(DECODE), RUNS)
    young.pass_time(30.0)
    assert young.state() == "decoding" and young.sent == []
    assert young.machine.requests["r"].workers == {DECODE}
    young.hear(TOKENIZER, StreamEnded(request_id="r"))
    assert young.sent == drop(DECODE)


def test_what_nobody_reports_is_fenced_off_by_the_next_attempt(young: Rig) -> None:
    young.submit(repeated=True)
    young.pass_time(1.9)
    assert young.state() == "recovering" and young.sent == []
    young.pass_time(0.2)
    assert young.sent == [resume(2)] and young.state() == "resuming"
    young.join(node(DECODE), RUNS)
    assert drop(DECODE)[0] in young.sent, "too late"


def test_after_the_grace_a_repeated_submission_is_fenced_off_at_once() -> None:
    rig = Rig(TOKENIZER, PREFILL, DECODE)
    rig.submit(repeated=True)
    assert rig.sent == [resume(2)]


def test_a_fresh_submission_does_not_wait(young: Rig) -> None:
    young.join(node(DECODE))
    young.submit()
    assert young.state() == "prefilling"


def test_an_older_attempt_than_its_tokenizer_means_is_dropped(young: Rig) -> None:
    young.join(node(DECODE), RUNS)
    young.submit(attempt=2, repeated=True)
    assert young.sent == drop(DECODE)
    young.pass_time(3.0)
    assert resume(3) in young.sent


def test_a_moved_stream_is_adopted_whoever_submits_first(young: Rig) -> None:
    """The tokenizer that the frontend has left does not know that, and says what it has."""
    young.join(node(DECODE), LiveRequest("r", 1024))
    young.submit(repeated=True)
    assert young.sent == []
    young.submit(attempt=1024, repeated=True, source="tokenizer-1")
    young.pass_time(2.0 + ORPHAN_GRACE_S + 1.0)
    assert young.sent == [] and young.machine.requests["r"].workers == {DECODE}


def test_a_moved_stream_is_adopted_whoever_reports_last(young: Rig) -> None:
    young.submit(repeated=True)
    young.submit(attempt=1024, repeated=True, source="tokenizer-1")
    young.join(node(DECODE), LiveRequest("r", 1024))
    young.pass_time(2.0 + ORPHAN_GRACE_S + 1.0)
    assert young.sent == [] and young.machine.requests["r"].workers == {DECODE}


def test_what_no_tokenizer_asks_for_is_dropped_in_the_end(young: Rig) -> None:
    young.join(node(DECODE), RUNS)
    young.pass_time(2.0 + ORPHAN_GRACE_S - 0.1)
    assert young.sent == []
    young.pass_time(0.2)
    assert young.sent == drop(DECODE)


def test_a_tokenizer_may_come_later_than_the_grace(young: Rig) -> None:
    young.join(node(DECODE), RUNS)
    young.pass_time(8.0)
    young.submit(repeated=True)
    assert young.sent == [] and young.state() == "decoding"


def test_of_two_reports_the_later_attempt_counts(young: Rig) -> None:
    young.join(node("decode-1"), LiveRequest("r", 2))
    young.join(node(DECODE), RUNS)
    young.submit(attempt=2, repeated=True)
    assert young.machine.requests["r"].workers == {"decode-1"}


def test_a_number_that_is_submitted_for_the_first_time_is_no_report_of_it(young: Rig) -> None:
    """What runs there has that number from a stream of an earlier life."""
    young.join(node(DECODE), RUNS)
    young.submit()
    assert young.sent[0] == drop(DECODE)[0] and young.state() == "prefilling"


def test_half_a_hand_over_has_lost_its_other_half(young: Rig) -> None:
    young.submit(repeated=True)
    young.join(node(DECODE), LiveRequest("r", 1, waits=True))
    assert drop(DECODE)[0] in young.sent and young.state() == "recovering"


def test_the_report_of_a_worker_that_died_is_not_believed(young: Rig) -> None:
    young.join(node(DECODE), RUNS)
    young.lose(DECODE)
    young.submit(repeated=True)
    assert young.state() == "recovering"


def test_an_adopted_stream_moves_when_its_worker_dies(young: Rig) -> None:
    young.join(node(DECODE), RUNS)
    young.submit(repeated=True)
    young.lose(DECODE)
    assert resume(2) in young.sent


def test_a_returning_worker_keeps_nothing_that_is_not_its_own() -> None:
    rig = Rig(TOKENIZER, PREFILL, DECODE)
    rig.submit()
    assert rig.one(Decode)[0] == DECODE
    rig.join(node("decode-1"), RUNS, LiveRequest("strange", 4))
    dropped = [("decode-1", Drop(request_id="strange", attempt=4))]
    assert rig.all(Drop) == drop("decode-1") + dropped and rig.state() == "prefilling"
    rig.join(node(DECODE), LiveRequest("strange", 4))
    assert rig.all(Drop) == [], "only the first word of a session reports"
