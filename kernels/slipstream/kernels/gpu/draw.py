"""Logits to tokens on the card: what `kernels.draw` computes, to the rounding of sums.

Nothing is sorted. What top-k and top-p leave are the tokens of some weight and more, and that
weight's bits are found three at a time: how many tokens, of what weight together, lie above each of
eight bounds. It ends as soon as one token lies between two of them. A row is one program: some
hundred microseconds with a vocabulary of 128 k and top-p, ten without filters, all rows at a time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.draw import Draw, Drawn
from slipstream.kernels.gpu.language import INTERPRETED

_TILE = 1 << 16 if INTERPRETED else 2048
"""Logits at a time; the interpreter takes as long for few as for many."""


@triton.jit
def _weights(logits, first, vocab, top, temperature, TILE: tl.constexpr):
    """exp((logit - top) / temperature): the largest is 1. Where they begin, and they themselves."""
    at = first + tl.arange(0, TILE)
    logit = tl.load(logits + at, mask=at < vocab, other=-float("inf"))
    return at, tl.exp((logit - top) / temperature)


@triton.jit
def _bound(
    logits, vocab, top, temperature, tokens, mass, TILE: tl.constexpr
):  # fmt: skip
    """Bits of the largest weight such that at least `tokens` have it or more, and weigh `mass`
    together; or lower ones that leave the same tokens."""
    low = tl.zeros([], tl.int32)
    shift = tl.full([], 27, tl.int32)
    while shift >= 0:
        bounds = low + (tl.arange(0, 8) << shift)
        counts = tl.zeros([8, TILE], tl.int32)
        masses = tl.zeros([8, TILE], tl.float32)
        for first in range(0, vocab, TILE):
            at, weight = _weights(logits, first, vocab, top, temperature, TILE)
            bits = tl.where(at < vocab, weight.to(tl.int32, bitcast=True), -1)
            above = bits[None, :] >= bounds[:, None]
            counts += above.to(tl.int32)
            masses += tl.where(above, weight[None, :], 0.0)
        count, weighed = tl.sum(counts, 1), tl.sum(masses, 1)
        enough = (count >= tokens) & (weighed >= mass)
        low = tl.maximum(low, tl.max(tl.where(enough, bounds, 0), 0))
        # What lies at the bound and above, less what lies above the next one.
        here = tl.max(tl.where(bounds == low, count, 0), 0)
        beyond = tl.max(tl.where(bounds > low, count, 0), 0)
        shift = tl.where(here - beyond <= 1, -1, tl.where(shift > 0, tl.maximum(shift - 3, 0), -1))
    return low


@triton.jit
def _mass(logits, vocab, top, temperature, least, TILE: tl.constexpr):
    """Of all weights from `least` bits on: float64."""
    total = tl.zeros([], tl.float64)
    for first in range(0, vocab, TILE):
        at, weight = _weights(logits, first, vocab, top, temperature, TILE)
        kept = (at < vocab) & (weight.to(tl.int32, bitcast=True) >= least)
        total += tl.sum(tl.where(kept, weight, 0.0).to(tl.float64), 0)
    return total


@triton.jit
def _invert(logits, vocab, top, temperature, least, point, TILE: tl.constexpr):
    """The first token, in order of id, at which the sum of kept weights exceeds `point`'s share."""
    total = _mass(logits, vocab, top, temperature, least, TILE)
    wanted = tl.minimum(point * total, total * (1.0 - 2.3e-16))
    before = tl.zeros([], tl.float64)
    found = tl.full([], -1, tl.int32)
    for first in range(0, vocab, TILE):
        at, weight = _weights(logits, first, vocab, top, temperature, TILE)
        kept = (at < vocab) & (weight.to(tl.int32, bitcast=True) >= least)
        weight = tl.where(kept, weight, 0.0).to(tl.float64)
        behind = before + tl.sum(weight, 0)
        if (found < 0) & (behind > wanted):
            passed = (before + tl.cumsum(weight, 0) > wanted) & (weight > 0.0)
            found = tl.min(tl.where(passed, at, vocab), 0)
            # Rounding may leave the share above the last sum.
            found = tl.where(found < vocab, found, tl.max(tl.where(weight > 0.0, at, -1), 0))
        before = behind
    return found


@triton.jit
def _draw(
    logits, stride, wanted, tokens, tops, vocab, FIELDS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One draw; `wanted` is a `Draw` in float64."""
    one = tl.program_id(0)
    row = tl.load(wanted + one * FIELDS).to(tl.int64)
    temperature = tl.load(wanted + one * FIELDS + 1).to(tl.float32)
    logits += row * stride
    best = tl.full([TILE], -float("inf"), tl.float32)
    place = tl.zeros([TILE], tl.int32)
    broken = tl.zeros([TILE], tl.int32)
    for first in range(0, vocab, TILE):
        at = first + tl.arange(0, TILE)
        logit = tl.load(logits + at, mask=at < vocab, other=-float("inf"))
        place = tl.where(logit > best, at, place)
        best = tl.where(logit > best, logit, best)
        broken |= (logit != logit).to(tl.int32)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, place, vocab), 0)
    is_number = (tl.max(broken, 0) == 0) & (tl.abs(top) < float("inf"))
    if (temperature > 0.0) & is_number:
        top_k = tl.load(wanted + one * FIELDS + 2)
        top_p = tl.load(wanted + one * FIELDS + 3)
        min_p = tl.load(wanted + one * FIELDS + 4).to(tl.float32)
        point = tl.load(wanted + one * FIELDS + 5)
        least = tl.maximum(min_p, 0.0).to(tl.int32, bitcast=True)
        if (top_k > 0) & (top_k < vocab):
            bound = _bound(logits, vocab, top, temperature, top_k.to(tl.int32), 0.0, TILE)
            least = tl.maximum(least, bound)
        if top_p < 1.0:
            mass = _mass(logits, vocab, top, temperature, least, TILE)
            share = (mass * top_p).to(tl.float32)
            bound = _bound(logits, vocab, top, temperature, 1, share, TILE)
            least = tl.maximum(least, bound)
        token = _invert(logits, vocab, top, temperature, least, point, TILE)
    tl.store(tokens + one, token.to(tl.int64))
    tl.store(tops + one, tl.where(tl.max(broken, 0) > 0, float("nan"), top))


def draw_async(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """A token for each draw, out of float32 `[rows, vocab]`, left where the logits are: int64
    `[draws]`, each in the vocabulary whatever the logits are; `Drawn.top`, float32 `[draws]`."""
    assert logits.stride(1) == 1 and logits.dtype == torch.float32
    assert all(0 <= each.row < len(logits) for each in draws)
    device, vocab = logits.device, logits.shape[1]
    wanted = torch.tensor([tuple(each) for each in draws], dtype=torch.float64)
    if device.type == "cuda":
        wanted = wanted.pin_memory()
    tokens = torch.empty(len(draws), dtype=torch.int64, device=device)
    tops = torch.empty(len(draws), dtype=torch.float32, device=device)
    if draws:
        _draw[(len(draws),)](
            *(logits, logits.stride(0), wanted.to(device, non_blocking=True), tokens, tops, vocab),
            FIELDS=len(Draw._fields),
            TILE=min(_TILE, triton.next_power_of_2(vocab)),
            num_warps=16,
        )
    return tokens, tops


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """The same, waited for."""
    tokens, tops = draw_async(logits, draws)
    return [Drawn(*each) for each in zip(tokens.tolist(), tops.tolist(), strict=True)]
