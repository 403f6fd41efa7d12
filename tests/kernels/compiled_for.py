"""Compiles every Triton kernel for a card that need not be there: `python compiled_for.py 90`.

Prints a line for each: its name and the shared memory that it takes. Run it without
TRITON_INTERPRET. Triton finds a driver that knows its target and nothing else.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from slipstream.kernels.drawn import batch_of
from slipstream.kernels.gpu import blocks, draw, rows
from slipstream.kernels.gpu.adapters import TritonAdapters
from slipstream.kernels.gpu.attention import attention
from slipstream.kernels.gpu.levels import grouped
from slipstream.kernels.gpu.tuning import FLOAT32, Tuning
from slipstream.kernels.levels import Levels
from slipstream.kernels.ops import FLOAT8, Heads

PROCESSORS = 132


class Target:
    """Nothing is launched, so nothing else is asked."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead(run: Any) -> Any:
    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **words: Any) -> None:
        made = run(self, *arguments, grid=grid, warmup=True, **words)
        print(self.__name__, made.metadata.shared, flush=True)

    return compile_only


def attend(tokens: int, requests: int, heads: Heads, dtypes: Any, tuning: Tuning) -> None:
    dtype, kv_dtype = dtypes
    pool = torch.zeros(4, 2, 2, heads.kv, 16, heads.dim).to(kv_dtype)
    qkv = torch.zeros(tokens, (heads.query + 2 * heads.kv) * heads.dim, dtype=dtype)
    angles = torch.zeros(tokens, heads.dim // 2)
    norms = torch.zeros(heads.dim, dtype=dtype), torch.zeros(heads.dim, dtype=dtype)
    batch = batch_of(
        tokens,
        [],
        block_tables=torch.zeros(requests, 8, dtype=torch.int32),
        query_starts=torch.zeros(requests + 1, dtype=torch.int32),
        context_lengths=torch.zeros(requests, dtype=torch.int32),
    )
    rows.rotate(qkv, angles, angles, batch.slots, pool, 0, heads, norms, 1e-5)
    attention(qkv, pool, 0, batch, heads, tuning)


def multiply(rows: int, group: int, kind: torch.dtype, dtype: torch.dtype) -> None:
    inputs, outputs = 4096, 4096
    width = inputs // 2 if kind == torch.uint8 else inputs
    levels = torch.zeros(outputs, width, dtype=torch.uint8).view(kind)
    scale = torch.zeros(outputs, inputs // group, dtype=dtype)
    zero = None if kind == FLOAT8 else torch.zeros(outputs, inputs // group, dtype=torch.int8)
    matrix = grouped(Levels(levels, scale, zero, inputs, group, dtype), None, PROCESSORS)
    assert matrix is not None
    matrix.times(torch.zeros(rows, inputs, dtype=dtype))


def adapt(dtype: torch.dtype) -> None:
    adapters = TritonAdapters((2048, 512), 2048, 4, 64, torch.device("cpu"))
    places = torch.zeros(4, dtype=torch.int32)
    adapters.add(torch.zeros(4, 2560, dtype=dtype), torch.zeros(4, 2048, dtype=dtype), places)


def main(capability: int) -> None:
    driver.set_active(Target(capability))
    JITFunction.run = compile_instead(JITFunction.run)
    half = torch.bfloat16
    pools = [half, FLOAT8] if capability >= 89 else [half]
    for kv_dtype in pools:
        attend(512, 1, Heads(32, 8, 128), (half, kv_dtype), Tuning({}, PROCESSORS))
        attend(4, 4, Heads(32, 8, 128), (half, kv_dtype), Tuning({}, PROCESSORS))
    attend(64, 2, Heads(21, 3, 96), (half, half), Tuning({}, PROCESSORS))
    exact = Tuning({}, PROCESSORS, FLOAT32)
    attend(64, 2, Heads(4, 2, 64), (torch.float32, torch.float32), exact)
    for dtype in (half, torch.float32):
        adapt(dtype)
    x, weight = torch.zeros(4, 4096, dtype=half), torch.zeros(4096, dtype=half)
    rows.rms_norm(x, weight, 1e-5, None)
    rows.rms_norm(x, weight, 1e-5, x.clone())
    rows.gate(x)
    if capability >= 89:
        rows.quantize(x, 4096)
    for kind in (torch.uint8, torch.int8, *([FLOAT8] if capability >= 89 else [])):
        for rows_of_x, group in ((1, 128), (8, 32), (64, 4096), (500, 64)):
            multiply(rows_of_x, group, kind, half)
        multiply(3, 128, kind, torch.float32)
    draw.draw_async(torch.zeros(2, 128_256), [draw.Draw(0)])
    memory = torch.zeros(4, 1 << 20, dtype=torch.uint8)
    blocks.verified_copy(memory, [1], memory, [2], True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
