"""How fast a queue moves, as it is known of late."""

from slipstream.scheduler.lane import (
    LATE_FRESH_S,
    LATE_KNOWN,
    RATE_WINDOW_S,
    RETRY_AFTER_MAX_S,
    Lateness,
    Pace,
)


def test_the_advice_when_to_come_back_follows_the_pace_of_late() -> None:
    pace = Pace()
    assert pace.retry_after_s(100.0) == 5.0, "nothing is known"
    for tenth in range(4):
        pace.ended(100.0 + tenth / 10)
    assert pace.retry_after_s(101.0) == RATE_WINDOW_S / 4
    assert pace.retry_after_s(100.2 + RATE_WINDOW_S) == RATE_WINDOW_S, "one was just now"
    for _ in range(1000):
        pace.ended(200.0)
    assert pace.retry_after_s(200.0) == 1.0 <= RETRY_AFTER_MAX_S


def test_lateness_is_the_worst_of_many_and_is_forgotten() -> None:
    lateness = Lateness()
    for number in range(LATE_KNOWN - 1):
        lateness.learn(-1.0, float(number))
    assert lateness.margin_s(15.0) == 0.0, "too few are known"
    lateness.learn(3.0, 15.0)
    assert lateness.margin_s(15.0) == 3.0
    assert lateness.margin_s(15.0 + LATE_FRESH_S + 1.0) == 0.0
    lateness.learn(2.0, 16.0 + 2 * LATE_FRESH_S)
    assert lateness.margin_s(16.0 + 2 * LATE_FRESH_S) == 0.0, "it begins anew"
