"""What the card allows, and whether its kernels are right: before anything is timed."""

import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from slipstream.loadtest.gpu.results import Row

BANDWIDTH, MATRICES = "memory, read and written", "bfloat16 products"
DEVICE = torch.device("cuda", 0)
CHECK = "slipstream.kernels.gpu.check"
"""The kernels' own: `check(device, seeds)` yields what each came to: kernel, error, ok."""
CHECK_S, SEEDS_MAX = 70.0, 8
LOST = 1e9
"""An error that is no number, or too large to be one."""


def median_ms(work: Callable[[], object], times: int = 20, warm: int = 3) -> float:
    """Of one call, by the device's clock."""
    for _ in range(warm):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(float(a.elapsed_time(b)) for a, b in pairwise(marks))


def measure(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy_ms = median_ms(partial(target.copy_, source))
    tell(Row(BANDWIDTH, 2 * source.nbytes / copy_ms / 1e6, "GB/s"))
    del source, target
    size = 8192
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    product_ms = median_ms(partial(torch.matmul, left, right))
    tell(Row(MATRICES, 2 * size**3 / product_ms / 1e9, "TFLOP/s"))


def check(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    """One row a kernel: the largest error of those drawn, and how many were wrong."""
    end_s = time.monotonic() + CHECK_S
    found: dict[str, list[tuple[float, bool]]] = {}
    for seed in range(SEEDS_MAX):
        for each in importlib.import_module(CHECK).check(DEVICE, range(seed, seed + 1)):
            found.setdefault(each.kernel, []).append((min(each.error, LOST), each.ok))
        if time.monotonic() > end_s:
            break
    for kernel, tried in found.items():
        wrong = sum(not ok for _, ok in tried)
        worst = max(error for error, _ in tried)
        share = 1 - wrong / len(tried)
        note = f"{len(tried)} shapes, {wrong} wrong"
        tell(Row(f"{kernel}, largest error", worst, "tolerances", 0.0, share, 1.0, note))
