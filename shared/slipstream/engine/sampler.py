"""Logits to tokens: a pure function of a row's logits, its history, and (seed, choice, position).

Nothing depends on the batch that a row happens to be in, and no random state is kept, so that any
worker draws the same token at position n. The order of steps and the meaning of the penalties
follow vLLM: logprobs of the raw logits; then `shaping`, then penalties; then what the backend
draws: temperature, min-p, top-k, top-p.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slipstream.engine.guide import COMPILE_TIMEOUT_S, Guide, LateError, UnreadError
from slipstream.engine.history import History
from slipstream.errors import ErrorCode, Problem
from slipstream.grammar import GrammarError
from slipstream.kernels.draw import Draw
from slipstream.kernels.ops import Backend
from slipstream.types import SamplingParams, TokenLogprobs

SCORED_AT_A_TIME = 32
"""Rows: each is a copy of the vocabulary."""
LATE_RETRY_AFTER_S = 2.0
"""Until then a few grammars more are compiled, this one perhaps: it is kept."""


class RowError(Exception):
    """One row cannot be sampled; the others of its batch can."""

    def __init__(self, reason: str, problem: Problem) -> None:
        """`reason`: for the log, with the request's name; `problem`: for the client."""
        super().__init__(reason)
        self.problem = problem


class Sample(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of one draw, the same on every machine: 53 bits of BLAKE2b."""
    key = struct.pack("<qqq", seed, choice, position)
    digest = hashlib.blake2b(key, digest_size=8, person=b"slipstream-draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(
    backend: Backend,
    logits: Tensor,
    rows: Sequence[int],
    histories: Sequence[History],
    eos_token_ids: frozenset[int],
) -> list[Sample | RowError]:
    """One token for each of `rows` of `logits`, float32 `[any, vocab]`, which are overwritten.

    `histories[i]` is the request of `rows[i]`; its next output position keys the draw. A row whose
    largest logit is not a finite number, from the model or since all tokens are barred, or whose
    grammar cannot be followed, gets a `RowError`. Waits for grammars, of all rows together no
    longer than `COMPILE_TIMEOUT_S`.
    """
    Guide.settle(history.guide for history in histories if history.guide is not None)
    raw = _raw_logprobs(logits, rows, histories)
    errors: dict[int, RowError] = {}
    for row, history in zip(rows, histories, strict=True):
        try:
            if history.shaping is not None:
                history.shaping.apply(logits[row], history.tokens, eos_token_ids)
        except GrammarError as error:
            errors[row] = _ungrammatical(history, error)
        _penalize(logits[row], history)
    draws = [
        wanted(row, history.sampling, history.num_output)
        for row, history in zip(rows, histories, strict=True)
    ]
    drawn = backend.draw(logits, draws)
    results: list[Sample | RowError] = []
    for (token, top), row, history in zip(drawn, rows, histories, strict=True):
        logprobs = None
        if row in raw and row not in errors and math.isfinite(top):
            logprobs = _report(raw[row], token, history.sampling.logprobs or 0)
        results.append(errors.get(row) or judged(history, token, top, logprobs))
    return results


def judged(
    history: History, token: int, top: float, logprobs: TokenLogprobs | None = None
) -> Sample | RowError:
    """What was drawn, unless the row's largest logit is no finite number."""
    return Sample(token, logprobs) if math.isfinite(top) else _undrawable(history, top)


def _undrawable(history: History, top: float) -> RowError:
    if history.shaping is None or top != -math.inf:
        problem = Problem(code=ErrorCode.INTERNAL, message="The model made no number.")
        return RowError(f"{history.request_id}: largest logit is {top}", problem)
    message = (
        f"No token may come after {history.num_output} of the answer: what the request allows, "
        "bars and asks the answer to be leaves none. Allow more, or bar less."
    )
    problem = Problem(code=ErrorCode.INVALID_VALUE, message=message)
    return RowError(f"{history.request_id}: every token is barred", problem)


def _ungrammatical(history: History, error: GrammarError) -> RowError:
    match error:
        case LateError():
            message = (
                f"The answer's format could not be made ready in {COMPILE_TIMEOUT_S:g} s: {error}. "
                f"Try again in {LATE_RETRY_AFTER_S:g} s."
            )
            code, retry_after_s = ErrorCode.QUEUE_FULL, LATE_RETRY_AFTER_S
            problem = Problem(code=code, message=message, retry_after_s=retry_after_s)
        case UnreadError():
            message = (
                "This worker cannot hold an answer to a format: its model folder has no "
                "tokenizer.json that can be used, and its log says why. Ask for no format."
            )
            problem = Problem(code=ErrorCode.INTERNAL, message=message)
        case _:
            message = f"The answer cannot be held to its format: {error}. Ask for a simpler one."
            problem = Problem(code=ErrorCode.INVALID_SCHEMA, message=message)
    return RowError(f"{history.request_id}: grammar: {error}", problem)


def wanted(row: int, params: SamplingParams, position: int) -> Draw:
    """Out of row `row` of the logits, for output position `position`."""
    if params.greedy:
        return Draw(row)
    return Draw(
        row,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        uniform(params.seed, params.choice, position),
    )


# --- Before the draw: log probabilities, penalties ------------------------------------------------


def _raw_logprobs(
    logits: Tensor, rows: Sequence[int], histories: Sequence[History]
) -> dict[int, Tensor]:
    return {
        row: torch.log_softmax(logits[row], -1)
        for row, history in zip(rows, histories, strict=True)
        if history.sampling.logprobs is not None
    }


def score(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log probabilities of `tokens[i]` by row i of `logits`, float32 `[len(tokens), vocab]`."""
    found: list[TokenLogprobs] = []
    for first in range(0, len(tokens), SCORED_AT_A_TIME):
        part = tokens[first : first + SCORED_AT_A_TIME]
        logprobs = torch.log_softmax(logits[first : first + len(part)], -1)
        top = logprobs.topk(min(num_top, logprobs.shape[1]))
        own = logprobs[torch.arange(len(part)), torch.tensor(part)].tolist()
        for token, logprob, ids, values in zip(
            part, own, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            found.append(TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True))))
    return found


def _report(logprobs: Tensor, token: int, num_top: int) -> TokenLogprobs:
    top = logprobs.topk(min(num_top, logprobs.shape[0]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprobs(token, float(logprobs[token]), tuple(pairs))


def _penalize(logits: Tensor, history: History) -> None:
    """Changes one row in place. Repetition counts prompt and output, the other two output alone."""
    sampling = history.sampling
    if sampling.repetition_penalty != 1.0:
        seen = _on_device(history.seen_ids(), logits)
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        ids, counts = (_on_device(array, logits) for array in history.output_counts())
        logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _on_device(ids: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(ids).to(like.device)
