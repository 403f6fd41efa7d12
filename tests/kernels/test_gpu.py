"""Triton's kernels against the reference: in Triton's interpreter, or on the card if there is one.

The same walk over the same drawn shapes that a card is checked with (`gpu.check`).
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.kernels.gpu import check
from slipstream.kernels.gpu.language import INTERPRETED
from slipstream.kernels.ops import FLOAT8, Quantization

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SEEDS = range(6)
UGLY = (5, 6, 32)
"""Of attention: contexts of one token beside longer ones; one token in one block, seven heads to a
KV head; one KV head of 64. Dimensions of heads that are no power of two are in `MORE`."""
MORE = (3, 7, 8)
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", FLOAT8: "float8"}


def operations() -> Iterator[Any]:
    """Each with the dtypes that it knows; only some look at the pool's."""
    for model, pool in itertools.product((torch.float32, torch.bfloat16), (None, FLOAT8)):
        for name in check.OF_FLOAT8_POOLS if pool else (*check.CASES, "padding"):
            mark = f"{KINDS[model]}-{KINDS[pool or model]}-{name}"
            yield pytest.param(name, model, pool or model, id=mark)


@pytest.mark.parametrize(("name", "model", "pool"), [*operations()])
def test_operations_agree_with_the_reference(
    name: str, model: torch.dtype, pool: torch.dtype
) -> None:
    seeds = UGLY if name in check.OF_FLOAT8_POOLS else SEEDS
    for seed in seeds if name == "padding" else {*seeds, *MORE}:
        assert (found := check.check_operation(name, seed, DEVICE, model, pool)).ok, found


@pytest.mark.slow
def test_all_agree_over_more_shapes() -> None:
    assert not [found for found in check.check(DEVICE, range(12)) if not found.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=KINDS.get)
@pytest.mark.parametrize("name", [*check.OF_WEIGHTS, check.FLOAT8_ROWS])
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


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_compile_for_cards_that_are_not_here(capability: int) -> None:
    """For NVIDIA's by compute capability; each with the shared memory that a program may take."""
    room = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}[capability]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = ":".join(sys.path)
    script = str(Path(__file__).with_name("compiled_for.py"))
    command = [sys.executable, script, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = dict(line.split() for line in done.stdout.splitlines())
    wanted = {"_chunks", "_splits", "_merge", "_rotate", "_rms_norm", "_gate", "_draw"}
    ours = {"_segments", "_chain", "_product", "_shrink", "_expand"}
    assert {*kernels} - {"_quantize"} == wanted | ours
    assert max(map(int, kernels.values())) <= room, kernels


def test_a_kernel_that_a_card_refuses_does_not_end_the_walk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> check.Checked:
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(check, "check_operation", refused)
    monkeypatch.setattr(check, "CASES", ("linear",))
    monkeypatch.setattr(check, "_NAMES", ("linear",))
    found = list(check.check(DEVICE, range(1)))
    assert [one.kernel for one in found][-2:] == ["draw", "blocks"]
    assert not found[0].ok and found[0].shape == "RuntimeError: out of resource: shared memory"
    assert all(one.ok for one in found[-2:])
