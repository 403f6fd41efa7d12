"""What comes back for each prompt, in the shape that users of vLLM know."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from slipstream.messages import TextDelta, TextLogprob
from slipstream.types import unpack_tokens


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None
    """From 1 on, among the alternatives that were asked for; None: it is not one of these."""
    decoded_token: str


Logprobs: TypeAlias = list[dict[int, Logprob]]
"""For each token: by token id, what was drawn and the likeliest."""


@dataclass
class CompletionOutput:
    """One choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    """None if it came as tokens or messages."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """None for the first token, which nothing comes before."""
    num_cached_tokens: int = 0
    error: str = ""
    """Why there is no answer: this prompt cannot be served, others can."""

    @property
    def finished(self) -> bool:
        return bool(self.error) or all(each.finish_reason for each in self.outputs)


def add(output: RequestOutput, choice: CompletionOutput, delta: TextDelta) -> None:
    """Take in the next piece of one choice."""
    choice.text += delta.text
    choice.token_ids += unpack_tokens(delta.tokens)
    if delta.logprobs:
        choice.logprobs = (choice.logprobs or []) + list(map(_table, delta.logprobs))
        said = sum(each.logprob for each in delta.logprobs)
        choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + said
    if delta.prompt_logprobs:
        output.prompt_logprobs = _of_prompt(delta.prompt_logprobs)
    if delta.finish_reason is not None:
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
    if delta.usage is not None:
        output.num_cached_tokens = max(output.num_cached_tokens, delta.usage.cached_tokens)


def _table(drawn: TextLogprob) -> dict[int, Logprob]:
    top = {
        each.token_id: Logprob(each.logprob, rank, each.text)
        for rank, each in enumerate(drawn.top, 1)
    }
    own = Logprob(drawn.logprob, None, drawn.text)
    return {drawn.token_id: top.get(drawn.token_id, own), **top}


def _of_prompt(said: Sequence[TextLogprob]) -> list[dict[int, Logprob] | None]:
    return [None if math.isnan(each.logprob) else _table(each) for each in said]
