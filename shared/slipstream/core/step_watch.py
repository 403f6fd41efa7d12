"""How long a step may take before its worker counts as hung.

`timeout_s` beyond what steps with as many tokens took: a fixed time alone would be too short for a
large model on few cores, or so long that a hung worker holds its streams for minutes.
"""

from collections.abc import Sequence

from slipstream.core.batching import Flight
from slipstream.core.machine import BatchPlan, CancelTimer, Effect, SetTimer
from slipstream.core.step_model import sample_of

TIMES_SLOWEST = 4.0
"""Contexts grow, neighbours come, clocks fall."""
UNMEASURED_S = 120.0
"""For the first step of its kind, which may have to compile, or to fault its weights in."""


class StepWatch:
    """One timer, set whenever a step begins or ends."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._prefill_token_s = self._decode_row_s = 0.0
        """The slowest so far; 0 until there was one."""
        self._limit_s = timeout_s

    def took(self, plan: BatchPlan, elapsed_s: float) -> None:
        sample = sample_of(plan.rows)
        if sample.prefill_tokens:  # a row that decodes beside them costs no more than a token
            tokens = sample.prefill_tokens + sample.decode_rows
            self._prefill_token_s = max(self._prefill_token_s, elapsed_s / tokens)
        elif sample.decode_rows:
            self._decode_row_s = max(self._decode_row_s, elapsed_s / sample.decode_rows)

    def limit_s(self, plan: BatchPlan) -> float:
        sample = sample_of(plan.rows)
        rate_s = self._prefill_token_s if sample.prefill_tokens else self._decode_row_s
        if not rate_s:
            return max(self.timeout_s, UNMEASURED_S)
        return self.timeout_s + TIMES_SLOWEST * rate_s * (
            sample.prefill_tokens + sample.decode_rows
        )

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
