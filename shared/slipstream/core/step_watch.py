"""How long a step may take before its worker counts as hung.

`timeout_s` beyond what steps with as many tokens took: a fixed time alone would be too short for a
large model on few cores, or so long that a hung worker holds its streams for minutes.
"""

from collections.abc import Sequence

from slipstream.core.batching import Flight
from slipstream.core.machine import BatchPlan, CancelTimer, Effect, SetTimer

MANY_TOKENS = 64
"""From here on a step takes as long as its tokens say; what a shorter one takes is its own."""
TIMES_SLOWEST = 4.0
"""Contexts grow, neighbours come, clocks fall."""
UNMEASURED_S = 120.0
"""For the first step of its kind, which may have to compile, or to fault its weights in."""


class StepWatch:
    """One timer, set whenever a step begins or ends."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._short_s = self._token_s = 0.0
        """The slowest so far: step of few tokens, and token of a longer one; 0 until there was
        one."""
        self._limit_s = timeout_s

    def took(self, plan: BatchPlan, elapsed_s: float) -> None:
        if (tokens := _tokens(plan)) < MANY_TOKENS:
            self._short_s = max(self._short_s, elapsed_s)
        else:
            self._token_s = max(self._token_s, elapsed_s / tokens)

    def limit_s(self, plan: BatchPlan) -> float:
        """`timeout_s` and four times the slowest of its kind."""
        if (tokens := _tokens(plan)) < MANY_TOKENS:
            slowest_s = self._short_s
        else:
            slowest_s = self._token_s * tokens
        if not slowest_s:
            return max(self.timeout_s, UNMEASURED_S)
        return self.timeout_s + TIMES_SLOWEST * slowest_s

    def timer(self, in_flight: Sequence[Flight], now_s: float) -> Effect:
        """For the first of those that are with the device."""
        if not in_flight:
            return CancelTimer("step")
        self._limit_s = self.limit_s(in_flight[0].plan)
        return SetTimer("step", now_s + self._limit_s)

    @property
    def fault(self) -> str:
        """What it means that the timer rings."""
        return f"no step has ended for {self._limit_s:.0f} s"


def _tokens(plan: BatchPlan) -> int:
    return sum(row.num_tokens for row in plan.rows)
