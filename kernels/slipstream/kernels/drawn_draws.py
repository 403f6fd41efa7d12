"""Logits and what is wanted of them, drawn from seeds, and when two draws of a token agree."""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.draw import Draw, Drawn, cutoff, draw

VOCABS = (1, 15, 16, 17, 255, 256, 257, 5000, 49152, 50257)
NEAR = 1e-5
"""Of a sum of probabilities: what rounding may move."""


def logits_and_draws(seed: int, vocabs: Sequence[int] = VOCABS) -> tuple[Tensor, list[Draw]]:
    """Logits, and what is wanted of them, ugly ones too."""
    some = random.Random(seed)
    vocab = some.choice(vocabs)
    size = (some.choice([1, 2, 9]), vocab)
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    logits *= some.choice([0.0, 0.3, 3.0, 30.0])
    logits[0, some.randrange(vocab)] = some.choice([-math.inf, 0.0, 60.0, math.inf, math.nan])
    return logits, [
        Draw(
            row=some.randrange(len(logits)),
            temperature=some.choice([0.0, 1e-50, 1e-9, 0.3, 1.0, 2.0]),
            top_k=some.choice([0, 0, 1, 2, 40, vocab, vocab + 1]),
            top_p=some.choice([1.0, 1.0, 0.0, 0.1, 0.9, 0.9999]),
            min_p=some.choice([0.0, 0.0, 0.05, 1.0]),
            point=some.choice([0.0, some.random(), some.random(), 1 - 2**-53]),
        )
        for _ in range(some.choice([1, 2, 40]))
    ]


def agree(logits: Tensor, wanted: Draw, one: Drawn, other: Drawn) -> bool:
    """Whether `other` is what the reference drew, `one`, or, where sums that are rounded otherwise
    decide, a token beside it that may be."""
    if not (one.top == other.top or (math.isnan(one.top) and math.isnan(other.top))):
        return False
    if not math.isfinite(one.top) or one.token == other.token:
        return True
    if not np.float32(wanted.temperature) or not _passes(logits[wanted.row], wanted, other.token):
        return False
    points = (max(wanted.point - NEAR, 0.0), wanted.point + NEAR)
    low, high = (
        each.token for each in draw(logits, [wanted._replace(point=point) for point in points])
    )
    return low <= other.token <= (logits.shape[1] - 1 if points[1] >= 1 else high)


def _passes(row: Tensor, wanted: Draw, token: int) -> bool:
    """Whether the filters leave the token."""
    scaled = (row - row.max()) / float(np.float32(wanted.temperature))
    probabilities = torch.softmax(scaled, -1).numpy()
    chosen = float(probabilities[token])
    return chosen > 0 and chosen >= (1 - NEAR) * cutoff(probabilities, wanted)
