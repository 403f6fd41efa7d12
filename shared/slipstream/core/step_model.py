"""What a step costs: seconds as a linear function of what it does.

    base + token * u + pair * ((c + u)^2 - c^2) + row * decodes + context * tokens they look back on

for u uncached tokens on top of c: DistServe's form (its `time_estimator.py`), in one formula for
steps that mix prefill and decode.
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from slipstream.core.machine import Row
from slipstream.messages import StepSample


class StepModel(msgspec.Struct, frozen=True):
    """Coefficients in seconds."""

    base_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_row_s: float
    decode_context_s: float

    def step_s(self, step: StepSample) -> float:
        """Predicted time of a step; its `elapsed_s` is not read."""
        return (
            self.base_s
            + self.prefill_token_s * step.prefill_tokens
            + self.prefill_pair_s * step.prefill_pairs
            + self.decode_row_s * step.decode_rows
            + self.decode_context_s * step.decode_context
        )


class Prompt(NamedTuple):
    """A prompt as work: what is not cached of it."""

    tokens: int
    pairs: int

    @classmethod
    def of(cls, cached_tokens: int, tokens: int) -> "Prompt":
        """`tokens` on top of those that are cached."""
        return cls(tokens, prefill_pairs(cached_tokens, tokens))


def prefill_pairs(cached_tokens: int, tokens: int) -> int:
    """(c + u)^2 - c^2: grows as the attention work of `tokens` on top of `cached_tokens`."""
    return tokens * (tokens + 2 * cached_tokens)


def sample_of(rows: Iterable[Row], elapsed_s: float = 0.0) -> StepSample:
    """What a step with these rows does. A row of one token decodes."""
    tokens = pairs = decodes = context = 0
    for row in rows:
        count = row.num_tokens
        if count == 1:
            decodes += 1
            context += row.start + 1
        else:
            tokens += count
            pairs += prefill_pairs(row.start, count)
    return StepSample(tokens, pairs, decodes, context, elapsed_s)
