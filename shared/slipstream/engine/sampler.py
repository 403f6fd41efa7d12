"""Logits to tokens: a pure function of a row's logits, its history, and (seed, choice, position).

Nothing depends on the batch that a row happens to be in, and no random state is kept, so that any
worker draws the same token at position n. The order of steps and the meaning of the penalties
follow vLLM: logprobs of the raw logits; then min_tokens and penalties; then temperature, min-p,
top-k, top-p.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slipstream.engine.history import History
from slipstream.types import SamplingParams, TokenLogprobs

Probabilities: TypeAlias = npt.NDArray[np.float32]

_SPAN = 256


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
    logits: Tensor, histories: Sequence[History], eos_token_ids: frozenset[int]
) -> list[Sample | RowError]:
    """One token for each row of `logits`, float32 `[rows, vocab]`, which is overwritten.

    `histories[r]` is the request of row r; its next output position keys the draw. A row whose
    largest logit is not a finite number gets a `RowError` that names the request.
    """
    raw = _raw_logprobs(logits, histories)
    for row, history in enumerate(histories):
        _penalize(logits[row], history, eos_token_ids)
    tokens = logits.argmax(-1)
    # A NaN or an infinity anywhere in a row is its maximum: argmax finds them.
    tops = logits.gather(1, tokens[:, None])[:, 0].tolist()
    chosen: list[int] = tokens.tolist()
    finite = [math.isfinite(top) for top in tops]
    random = [r for r, h in enumerate(histories) if finite[r] and not h.sampling.greedy]
    if random:
        chosen_rows = logits if len(random) == len(histories) else logits[random]
        drawn = _draw(chosen_rows, [histories[r] for r in random])
        for row, token in zip(random, drawn, strict=True):
            chosen[row] = token
    results: list[Sample | RowError] = []
    for row, history in enumerate(histories):
        if not finite[row]:
            results.append(RowError(f"{history.request_id}: largest logit is {tops[row]}"))
            continue
        logprobs = None
        if row in raw:
            logprobs = _report(raw[row], chosen[row], history.sampling.logprobs or 0)
        results.append(Sample(chosen[row], logprobs))
    return results


# --- Before the draw: log probabilities, min_tokens, penalties ------------------------------------


def _raw_logprobs(logits: Tensor, histories: Sequence[History]) -> dict[int, Tensor]:
    wanted = [r for r, history in enumerate(histories) if history.sampling.logprobs is not None]
    return {row: torch.log_softmax(logits[row], -1) for row in wanted}


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


# --- The draw -------------------------------------------------------------------------------------


def _draw(logits: Tensor, histories: Sequence[History]) -> list[int]:
    """Inverse of the cumulative distribution over the vocabulary in order of token id.

    Not in order of probability: two workers whose logits differ by rounding would order near-equal
    tokens differently and draw different ones, while sums in order of id move by rounding only.
    """
    temperature = _column([history.sampling.temperature for history in histories], logits)
    # The maximum goes first, so that no temperature, however small, overflows. In place: fresh
    # pages for some more megabytes would cost more than the arithmetic.
    logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)
    tokens = []
    rows: Probabilities = torch.softmax(logits, -1).cpu().numpy()
    for row, history in zip(rows, histories, strict=True):
        params = history.sampling
        if cutoff := _cutoff(row, params):
            row[row < cutoff] = 0.0
        tokens.append(_invert(row, uniform(params.seed, params.choice, history.num_output)))
    return tokens


def _invert(row: Probabilities, point: float) -> int:
    """First token at which the cumulative sum exceeds `point`'s share of the total.

    Sums spans of the vocabulary first, and runs through one span only.
    """
    starts = np.arange(0, row.shape[0], _SPAN)
    cumulative = np.add.reduceat(row, starts, dtype=np.float64).cumsum()
    target = min(point * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    span = int(np.searchsorted(cumulative, target, side="right"))
    inside = row[starts[span] : starts[span] + _SPAN]
    before = cumulative[span - 1] if span else 0.0
    found = int(np.searchsorted(before + inside.cumsum(dtype=np.float64), target, side="right"))
    # Rounding may leave the target above the span's last sum.
    return int(starts[span]) + min(found, int(inside.nonzero()[0][-1]))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _cutoff(row: Probabilities, params: SamplingParams) -> float:
    """The least probability that passes min-p, top-k and top-p, in this order; ties pass together.

    top-p is a share of what min-p and top-k have left. Sorts the few tokens that can matter only: a
    full sort of a vocabulary takes milliseconds.
    """
    cutoff = np.float32(params.min_p) * row.max() if params.min_p else np.float32(0.0)
    if 0 < params.top_k < row.shape[0]:
        cutoff = max(cutoff, _kth_largest(row, params.top_k))
    if params.top_p >= 1.0:
        return float(cutoff)
    kept = row[row >= cutoff] if cutoff > 0.0 else row
    total = kept.sum(dtype=np.float64)
    # All tokens below this bound together weigh less than what top-p cuts off.
    bound = (1.0 - params.top_p) * total / row.shape[0]
    ranked = np.sort(kept[kept >= bound])[::-1].astype(np.float64)
    last = int(np.searchsorted(ranked.cumsum(), params.top_p * total))
    return float(ranked[min(last, ranked.shape[0] - 1)])


def _kth_largest(row: Probabilities, k: int) -> np.float32:
    """Of 4 k groups, k reach the k-th largest of their maxima: nothing below it counts."""
    groups = min(4 * k, row.shape[0])
    width = row.shape[0] // groups
    maxima = row[: groups * width].reshape(groups, width).max(1)
    candidates = row[row >= np.partition(maxima, groups - k)[groups - k]]
    return np.float32(np.partition(candidates, candidates.shape[0] - k)[-k])
