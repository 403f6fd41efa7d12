"""Finds the launches of this card and writes them to its file: `python -m slipstream.kernels tune`.

Once for each kind of card, in a few minutes; the file goes into the repository. Nothing is tuned
when a worker starts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from slipstream.kernels.drawn import BLOCK_TOKENS, batch_of
from slipstream.kernels.gpu.attention import attention
from slipstream.kernels.gpu.tuning import FOLDER, USUAL, Entries, Launch, Tuning, write
from slipstream.kernels.ops import FLOAT8, Heads

POOL_BYTES = 8 << 30
"""Far more than any cache holds, so that each run reads memory."""
_DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """Attention of `rows` requests, of whose `context` the last `tokens` are computed."""

    rows: int
    tokens: int
    context: int
    heads: Heads
    kv_dtype: torch.dtype = _DTYPE

    @property
    def bytes_read(self) -> int:
        """Keys and values, once."""
        each = 2 * self.heads.kv * self.heads.dim * self.kv_dtype.itemsize
        return self.rows * self.context * each


_WIDE, _NARROW = Heads(32, 8, 128), Heads(14, 2, 64)
_KINDS = ((_WIDE, _DTYPE), (_WIDE, FLOAT8), (_NARROW, _DTYPE))
SHAPES: dict[str, tuple[Shape, ...]] = {
    "splits": tuple(
        Shape(rows, 1, context, heads, kv_dtype)
        for heads, kv_dtype in _KINDS
        for rows, context in ((1, 16384), (8, 8192), (64, 4096), (256, 2048))
    ),
    "chunks": tuple(
        Shape(1, tokens, 2 * tokens, heads, kv_dtype)
        for heads, kv_dtype in _KINDS
        for tokens in (256, 2048, 8192)
    ),
}


def ready(shape: Shape, device: torch.device, tuning: Tuning) -> Callable[[], Tensor]:
    """The attention of one layer on random keys and values, to be called again and again; each time
    of another part of the memory, as the layers of a model are."""
    rows, heads = shape.rows, shape.heads
    width = -(-shape.context // BLOCK_TOKENS)
    layers = max(1, min(32, POOL_BYTES // (shape.bytes_read or 1)))
    sizes = (rows * width, layers, 2, heads.kv, BLOCK_TOKENS, heads.dim)
    pool = torch.empty(sizes, dtype=_DTYPE, device=device).normal_().to(shape.kv_dtype)
    tables = torch.randperm(rows * width, device=device).int().view(rows, width)
    total = rows * shape.tokens
    qkv = torch.randn(total, (heads.query + 2 * heads.kv) * heads.dim, device=device).to(_DTYPE)
    batch = batch_of(
        total,
        [],
        device,
        block_tables=tables,
        query_starts=torch.arange(rows + 1, dtype=torch.int32) * shape.tokens,
        context_lengths=torch.full((rows,), shape.context, dtype=torch.int32),
    )
    turn = iter(range(1 << 62))

    def run() -> Tensor:
        return attention(qkv, pool, next(turn) % layers, batch, heads, tuning)

    return run


def time_ms(run: Callable[[], object]) -> float:
    """The median, on the card's own clock."""
    measured: float = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return measured


def best(kernel: str, shape: Shape, device: torch.device, processors: int) -> tuple[Launch, float]:
    """The launch that takes least, and its time in ms. One that the card has no room for is left
    out."""
    found: tuple[Launch, float] | None = None
    for launch in USUAL[kernel]:
        try:
            took = time_ms(ready(shape, device, Tuning.fixed(kernel, launch, processors)))
        except triton.runtime.errors.OutOfResources:
            continue
        if found is None or took < found[1]:
            found = launch, took
    assert found is not None, f"no launch of {kernel} fits"
    return found


def tune(folder: Path = FOLDER) -> Path:
    """The file that was written. OSError: it cannot be."""
    device = torch.device("cuda")
    card = torch.cuda.get_device_properties(device)
    entries: Entries = {}
    for kernel, shapes in SHAPES.items():
        entries[kernel] = []
        for shape in shapes:
            if shape.kv_dtype == FLOAT8 and (card.major, card.minor) < (8, 9):
                continue
            launch, took = best(kernel, shape, device, card.multi_processor_count)
            size = {"rows": shape.rows} if kernel == "splits" else {"tokens": shape.tokens}
            size["head_dim"], size["kv_bytes"] = shape.heads.dim, shape.kv_dtype.itemsize
            size["group"] = shape.heads.query // shape.heads.kv
            entries[kernel].append({"shape": size, "launch": launch})
            rate = shape.bytes_read / took / 1e6
            print(f"{kernel} {size}: {took:.3f} ms, {rate:.0f} GB/s, {launch}", flush=True)
    return write(card.name, entries, folder)
