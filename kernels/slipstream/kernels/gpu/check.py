"""Every kernel against its reference, on a card or in the interpreter: one walk over drawn shapes.

Tests go through it, and whoever measures a card does so first.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128_digest

from slipstream.kernels.draw import draw as reference_draw
from slipstream.kernels.drawn import CASES, TOLERANCE, Shapes, outcome
from slipstream.kernels.drawn_draws import agree, logits_and_draws
from slipstream.kernels.gpu import blocks
from slipstream.kernels.gpu.backend import TritonBackend
from slipstream.kernels.ops import FLOAT8, Quantization, has_float8
from slipstream.kernels.reference import Reference

HEAD_DIMS = (16, 64, 80, 96, 128, 256)
VOCABS = (1, 15, 257, 5000, 49152)
FLOAT8_STEP = (0.13, 2**-9)
"""Tolerances of a float8 pool: two roundings of one number may lie a step apart."""
WAYS: tuple[tuple[torch.dtype, torch.dtype, Quantization], ...] = (
    (torch.float32, torch.float32, "none"),
    (torch.bfloat16, torch.bfloat16, "none"),
    (torch.bfloat16, FLOAT8, "none"),
    (torch.bfloat16, torch.bfloat16, "fp8"),
)
"""Dtypes of activations and of the pool, and what weights are made into."""
OF_FLOAT8_POOLS, OF_WEIGHTS = ("attention", "padding"), ("linear", "gated")
_NAMES = (*CASES, "padding")
FLOAT8_ROWS = "quantized_rows_of_float8"


class Checked(NamedTuple):
    kernel: str
    shape: str
    error: float
    """The largest, in tolerances."""

    @property
    def ok(self) -> bool:
        return self.error <= 1.0


def check(device: torch.device, seeds: range) -> Iterator[Checked]:
    """All kernels; what fails says so and the walk goes on.

    On a card each shape's kernels are compiled first: some ten seconds for each seed.
    """
    for dtype, kv_dtype, quantization in WAYS:
        if not has_float8(device) and (kv_dtype == FLOAT8 or quantization == "fp8"):
            continue
        names = (*OF_WEIGHTS, FLOAT8_ROWS) if quantization == "fp8" else _NAMES
        for name in OF_FLOAT8_POOLS if kv_dtype == FLOAT8 else names:
            for seed in seeds:
                given = name, seed, device, dtype, kv_dtype, quantization
                yield _tried(name, partial(check_operation, *given))
    for seed in seeds:
        yield _tried("draw", partial(check_draw, seed, device))
        yield _tried("blocks", partial(check_blocks, seed, device))


def _tried(kernel: str, run: Callable[[], Checked]) -> Checked:
    """A card may refuse to compile or to launch one; the others are still to be seen."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 (whatever it is, it is this kernel's result)
        said = (str(error).splitlines() or [""])[0]
        return Checked(kernel, f"{type(error).__name__}: {said:.200}", float("inf"))


def check_operation(
    name: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    quantization: Quantization = "none",
) -> Checked:
    case = getattr(Shapes(seed, dtype, device, kv_dtype, HEAD_DIMS), name)()
    backend = TritonBackend(dtype, device, quantization, kv_dtype)
    result, pool = outcome(backend, case)
    wanted, wanted_pool = outcome(Reference(quantization), case)
    error = _error(result, wanted, *TOLERANCE[dtype])
    if name in OF_FLOAT8_POOLS:
        step = FLOAT8_STEP if kv_dtype == FLOAT8 else TOLERANCE[dtype]
        error = max(error, _error(pool, wanted_pool, *step))
        if result.isnan().any():  # from beyond a context
            error = float("inf")
    kinds = f"{_word(dtype)}, pool {_word(kv_dtype)}, weights {quantization}"
    sizes = f"{list(result.shape)}, {len(case.batch.context_lengths)} rows"
    return Checked(name, f"seed {seed}: {sizes}, {kinds}", error)


def check_draw(seed: int, device: torch.device) -> Checked:
    """A draw is right or not: no tolerances, or too many."""
    logits, draws = logits_and_draws(seed, VOCABS)
    draws = draws[: 40 if logits.shape[1] < 10_000 else 5]  # for the interpreter's sake
    drawn = TritonBackend(torch.float32, device).draw(logits.to(device), draws)
    pairs = zip(draws, reference_draw(logits, draws), drawn, strict=True)
    right = all(agree(logits, wanted, one, other) for wanted, one, other in pairs)
    return Checked("draw", f"seed {seed}: {list(logits.shape)}", 0.0 if right else float("inf"))


def check_blocks(seed: int, device: torch.device) -> Checked:
    """Copies of blocks and their digests, bit by bit."""
    some = np.random.default_rng(seed)
    num_bytes = int(some.choice([256, 320, 1024, 1088, 4096, 9 * 1024, 65 * 1024 + 64]))
    content = some.integers(0, 256, (9, num_bytes), np.uint8)
    order, places = some.permutation(9)[:5].tolist(), some.permutation(12)[:5].tolist()
    source = torch.from_numpy(content).to(device)
    target = torch.zeros(12, num_bytes, dtype=torch.uint8, device=device)
    words = blocks.verified_copy(source, order, target, places, True)
    assert words is not None
    wanted = np.zeros((12, num_bytes), np.uint8)
    wanted[places] = content[order]
    right = np.array_equal(target.cpu().numpy(), wanted)
    right &= blocks.digest_bytes(words) == tuple(xxh3_128_digest(content[row]) for row in order)
    right &= blocks.digests(source, order) == blocks.digest_bytes(words)
    return Checked("blocks", f"seed {seed}: {num_bytes} bytes", 0.0 if right else float("inf"))


def _error(actual: Tensor, wanted: Tensor, relative: float, absolute: float) -> float:
    """Of where both are numbers, in tolerances; infinite if one alone is none."""
    actual, wanted = actual.double(), wanted.double()
    if actual.shape != wanted.shape or not torch.equal(actual.isnan(), wanted.isnan()):
        return float("inf")
    off = (actual - wanted).abs() / (absolute + relative * wanted.abs())
    return float(off.nan_to_num(0.0).max()) if off.numel() else 0.0


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
