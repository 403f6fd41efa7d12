"""Logits to tokens: a pure function of a row's logits, its history, and (seed, choice, position).

Nothing depends on the batch that a row happens to be in, and no random state is kept, so that any
worker draws the same token at position n. The order of steps and the meaning of the penalties
follow vLLM: logprobs of the raw logits; then min_tokens and penalties; then what the backend draws:
temperature, min-p, top-k, top-p.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slipstream.engine.history import History
from slipstream.kernels.draw import Draw
from slipstream.kernels.ops import Backend
from slipstream.types import TokenLogprobs

SCORED_AT_A_TIME = 32
"""Rows: each is a copy of the vocabulary."""


class RowError(Exception):
    """One row cannot be sampled; the others of its batch can."""


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
    """One token for each of `rows` of `logits`, float32 `[any, vocab]`; penalties overwrite them.

    `histories[i]` is the request of `rows[i]`; its next output position keys the draw. A row whose
    largest logit is not a finite number gets a `RowError` that names the request.
    """
    raw = _raw_logprobs(logits, rows, histories)
    for row, history in zip(rows, histories, strict=True):
        _penalize(logits[row], history, eos_token_ids)
    draws = [_wanted(row, history) for row, history in zip(rows, histories, strict=True)]
    results: list[Sample | RowError] = []
    for (token, top), row, history in zip(
        backend.draw(logits, draws), rows, histories, strict=True
    ):
        if not math.isfinite(top):
            results.append(RowError(f"{history.request_id}: largest logit is {top}"))
            continue
        logprobs = None
        if row in raw:
            logprobs = _report(raw[row], token, history.sampling.logprobs or 0)
        results.append(Sample(token, logprobs))
    return results


def _wanted(row: int, history: History) -> Draw:
    params = history.sampling
    if params.greedy:
        return Draw(row)
    return Draw(
        row,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        uniform(params.seed, params.choice, history.num_output),
    )


# --- Before the draw: log probabilities, min_tokens, penalties ------------------------------------


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


def _penalize(logits: Tensor, history: History, eos_token_ids: frozenset[int]) -> None:
    """Changes one row in place. Repetition counts prompt and output, the other two output alone."""
    sampling = history.sampling
    if history.num_output < sampling.min_tokens:
        stops = set(sampling.stop_token_ids)
        stops |= frozenset() if sampling.ignore_eos else eos_token_ids
        if known := [token for token in stops if 0 <= token < logits.shape[0]]:
            logits[known] = -math.inf
    if sampling.repetition_penalty != 1.0:
        seen = _on_device(history.seen_ids(), logits)
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        ids, counts = (_on_device(array, logits) for array in history.output_counts())
        logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _on_device(ids: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(ids).to(like.device)
