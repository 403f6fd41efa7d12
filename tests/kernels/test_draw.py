"""The compiled draw against the reference, and both against what may not be drawn."""

import ctypes
import math
import random

import numpy as np
import pytest
import torch

from slipstream.kernels.draw import Draw, cutoff
from slipstream.kernels.program import CpuBackend
from slipstream.kernels.reference import Reference

SEEDS = range(15)
NEAR = 1e-5
"""Of a sum of probabilities: what rounding may move."""


def drawn(seed: int) -> tuple[torch.Tensor, list[Draw]]:
    """Logits, and what is wanted of them, ugly ones too."""
    some = random.Random(seed)
    vocab = some.choice([1, 15, 16, 17, 255, 256, 257, 5000, 49152, 50257])
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


def passes(row: torch.Tensor, wanted: Draw, token: int) -> bool:
    """Whether the filters leave the token."""
    scaled = (row - row.max()) / float(np.float32(wanted.temperature))
    probabilities = torch.softmax(scaled, -1).numpy()
    chosen = float(probabilities[token])
    return chosen > 0 and chosen >= (1 - NEAR) * cutoff(probabilities, wanted)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_draw_agrees_with_the_reference(compiled: ctypes.CDLL, threads: int) -> None:
    """Or, where sums that are rounded otherwise decide, takes a token beside it that may be."""
    backend = CpuBackend(compiled, threads, torch.float32)
    for seed in SEEDS:
        logits, draws = drawn(seed)
        for wanted, one, other in zip(
            draws, Reference().draw(logits, draws), backend.draw(logits, draws), strict=True
        ):
            told = f"seed {seed}, {wanted}: {one}, {other}"
            assert one.top == other.top or (math.isnan(one.top) and math.isnan(other.top)), told
            if not math.isfinite(one.top) or one.token == other.token:
                continue
            assert np.float32(wanted.temperature), told
            assert passes(logits[wanted.row], wanted, other.token), told
            points = (max(wanted.point - NEAR, 0.0), wanted.point + NEAR)
            near = [wanted._replace(point=point) for point in points]
            low, high = (each.token for each in Reference().draw(logits, near))
            last = logits.shape[1] - 1 if points[1] >= 1 else high
            assert low <= other.token <= last, told


def test_a_draw_of_a_row_that_is_not_there_is_refused(compiled: ctypes.CDLL) -> None:
    backend = CpuBackend(compiled, 1, torch.float32)
    for row in (-1, 2):
        with pytest.raises(AssertionError):
            backend.draw(torch.zeros(2, 16), [Draw(row)])
