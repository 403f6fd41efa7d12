"""Triton's kernels against the reference: in Triton's interpreter, or on the card if there is one.

The same walk over the same drawn shapes that a card is checked with (`gpu.check`).
"""

import pytest
import torch

pytest.importorskip("triton")

from slipstream.kernels.gpu import check
from slipstream.kernels.gpu.language import INTERPRETED
from slipstream.kernels.ops import FLOAT8, Quantization

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SEEDS = range(6)
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", FLOAT8: "float8"}


@pytest.mark.parametrize("name", [*check.CASES, "padding"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, FLOAT8),
        (torch.bfloat16, FLOAT8),
    ],
    ids=lambda dtypes: "-".join(KINDS[each] for each in dtypes),
)
def test_operations_agree_with_the_reference(
    name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    if dtypes[1] == FLOAT8 and name not in check.OF_FLOAT8_POOLS:
        pytest.skip("has no pool")
    for seed in SEEDS:
        assert (found := check.check_operation(name, seed, DEVICE, *dtypes)).ok, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=KINDS.get)
@pytest.mark.parametrize("name", check.OF_WEIGHTS)
def test_products_of_float8_agree_with_the_reference(name: str, dtype: torch.dtype) -> None:
    quantization: Quantization = "fp8"
    for seed in SEEDS:
        found = check.check_operation(name, seed, DEVICE, dtype, dtype, quantization)
        assert found.ok, found


@pytest.mark.parametrize("seed", range(12))
def test_draws_agree_with_the_reference(seed: int) -> None:
    assert (found := check.check_draw(seed, DEVICE)).ok, found


@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_copied_and_digested(seed: int) -> None:
    assert (found := check.check_blocks(seed, DEVICE)).ok, found
