"""Logits to tokens in plain torch and numpy: what the compiled draw computes, and its oracle.

A row's largest logit, or a draw from its distribution after temperature, min-p, top-k and top-p, in
this order. Nothing depends on the batch that a row happens to be in.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Probabilities: TypeAlias = npt.NDArray[np.float32]

_SPAN = 256


class Draw(NamedTuple):
    """Wanted: a token of one row."""

    row: int
    """Of the logits."""
    temperature: float = 0.0
    """0, also when rounded to float32: the first of the largest logits."""
    top_k: int = 0
    """0: all"""
    top_p: float = 1.0
    min_p: float = 0.0
    point: float = 0.0
    """In [0, 1): the token is that at which the sum over the vocabulary passes this share."""


class Drawn(NamedTuple):
    token: int
    top: float
    """The row's largest logit; a NaN anywhere in the row is that. Not finite: no token."""


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """A token for each draw, out of float32 `[rows, vocab]`."""
    tops, tokens = logits.max(-1)  # a NaN is the largest
    found = [Drawn(int(tokens[each.row]), float(tops[each.row])) for each in draws]
    return [
        Drawn(_random(logits[wanted.row], wanted, top), top)
        if np.float32(wanted.temperature) and math.isfinite(top)
        else Drawn(token, top)
        for wanted, (token, top) in zip(draws, found, strict=True)
    ]


def as_tensors(drawn: Sequence[Drawn], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, int64, and tops, float32, of a draw that the host has made."""
    tokens, tops = zip(*drawn, strict=True) if drawn else ((), ())
    made = torch.tensor(tokens, dtype=torch.int64), torch.tensor(tops, dtype=torch.float32)
    return made[0].to(device), made[1].to(device)


def _random(logits: Tensor, wanted: Draw, top: float) -> int:
    # The maximum goes first, so that no temperature, however small, overflows.
    scaled = (logits - top) / float(np.float32(wanted.temperature))
    row: Probabilities = torch.softmax(scaled, -1).cpu().numpy()
    if least := cutoff(row, wanted):
        row[row < least] = 0.0
    return _invert(row, wanted.point)


def _invert(row: Probabilities, point: float) -> int:
    """First token at which the cumulative sum exceeds `point`'s share of the total.

    In order of token id, not of probability: two workers whose logits differ by rounding would
    order near-equal tokens differently and draw different ones, while sums in order of id move by
    rounding only. Sums spans of the vocabulary first, and runs through one span only.
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


def cutoff(row: Probabilities, wanted: Draw) -> float:
    """The least probability that passes min-p, top-k and top-p, in this order; ties pass together.

    top-p is a share of what min-p and top-k have left. Sorts the few tokens that can matter only: a
    full sort of a vocabulary takes milliseconds.
    """
    least = np.float32(wanted.min_p) * row.max() if wanted.min_p else np.float32(0.0)
    if 0 < wanted.top_k < row.shape[0]:
        least = max(least, np.partition(row, -wanted.top_k)[-wanted.top_k])
    if wanted.top_p >= 1.0:
        return float(least)
    kept = row[row >= least] if least > 0.0 else row
    total = kept.sum(dtype=np.float64)
    # All tokens below this bound together weigh less than what top-p cuts off.
    bound = (1.0 - wanted.top_p) * total / row.shape[0]
    ranked = np.sort(kept[kept >= bound])[::-1].astype(np.float64)
    last = int(np.searchsorted(ranked.cumsum(), wanted.top_p * total))
    return float(ranked[min(last, ranked.shape[0] - 1)])
