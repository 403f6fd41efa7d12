"""How far the wall clock is ahead of the clock that machines are told."""

import time

_TRIES = 5


def wall_offset_ns() -> int:
    """Asked each time, for the wall clock may be set. Of some readings the one with the shortest
    pause: a process that is put aside between two looks would be off by that."""
    readings = []
    for _ in range(_TRIES):
        before_ns, wall_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after_ns - before_ns, wall_ns - (before_ns + after_ns) // 2))
    return min(readings)[1]
