"""The compiled draw against the reference, and both against what may not be drawn."""

import ctypes

import pytest
import torch

from slipstream.kernels.draw import Draw
from slipstream.kernels.drawn_draws import agree, logits_and_draws
from slipstream.kernels.program import CpuBackend
from slipstream.kernels.reference import Reference

SEEDS = range(15)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_draw_agrees_with_the_reference(compiled: ctypes.CDLL, threads: int) -> None:
    backend = CpuBackend(compiled, threads, torch.float32)
    for seed in SEEDS:
        logits, draws = logits_and_draws(seed)
        for wanted, one, other in zip(
            draws, Reference().draw(logits, draws), backend.draw(logits, draws), strict=True
        ):
            told = f"seed {seed}, {wanted}: {one}, {other}"
            assert agree(logits, wanted, one, other), told


def test_a_draw_of_a_row_that_is_not_there_is_refused(compiled: ctypes.CDLL) -> None:
    backend = CpuBackend(compiled, 1, torch.float32)
    for row in (-1, 2):
        with pytest.raises(AssertionError):
            backend.draw(torch.zeros(2, 16), [Draw(row)])
