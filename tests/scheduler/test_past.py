"""What is remembered of requests that have ended."""

from slipstream.errors import ErrorCode, Problem
from slipstream.scheduler import past as module
from slipstream.scheduler.past import RATE_WINDOW_S, RETRY_AFTER_MAX_S, TOMBSTONE_S, Past

PROBLEM = Problem(code=ErrorCode.DEADLINE, message="Too late.")


def test_an_end_is_remembered_for_a_while() -> None:
    past = Past()
    past.bury("r", 3, PROBLEM, 10.0)
    past.expire(10.0 + TOMBSTONE_S - 0.1)
    tombstone = past.find("r")
    assert tombstone is not None and (tombstone.attempt, tombstone.problem) == (3, PROBLEM)
    past.expire(10.0 + TOMBSTONE_S)
    assert past.find("r") is None


def test_who_ended_twice_is_remembered_from_the_second_time_on() -> None:
    past = Past()
    past.bury("r", 1, None, 0.0)
    past.bury("s", 1, None, 1.0)
    past.bury("r", 2, None, 2.0)
    past.expire(1.0 + TOMBSTONE_S)
    tombstone = past.find("r")
    assert past.find("s") is None and tombstone is not None and tombstone.attempt == 2


def test_memory_is_bounded() -> None:
    past = Past()
    for number in range(module.TOMBSTONES_MAX + 2):
        past.bury(f"r{number}", 1, None, 0.0)
    assert past.find("r1") is None and past.find("r2") is not None


def test_the_advice_when_to_come_back_follows_the_pace_of_late() -> None:
    past = Past()
    assert past.retry_after_s(100.0) == 5.0, "nothing is known"
    for tenth in range(4):
        past.bury(f"r{tenth}", 1, None, 100.0 + tenth / 10)
    assert past.retry_after_s(101.0) == RATE_WINDOW_S / 4
    assert past.retry_after_s(100.2 + RATE_WINDOW_S) == RATE_WINDOW_S, "one was just now"
    for number in range(1000):
        past.bury(f"s{number}", 1, None, 200.0)
    assert past.retry_after_s(200.0) == 1.0 <= RETRY_AFTER_MAX_S
