"""What is remembered of requests that have ended."""

from slipstream.errors import ErrorCode, Problem
from slipstream.scheduler import past as module
from slipstream.scheduler.past import TOMBSTONE_S, Past

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
