"""Attention over KV blocks, read where they lie, for any mix of chunks and single tokens.

The query heads of one KV head are packed into one tile: row `m` of it is query `m // GROUP` and
head `m % GROUP`, so keys and values are read once for all of them. Rows of few queries, as decodes
and drafts are, are split over their context and put together again; others walk through it. What
lies beyond a context may be NaN: it is not loaded.

Decode moves bytes. Its floor is `context * kv_heads * head_dim * 2 * bytes` over the memory's
bandwidth: 4 KiB for each head of a bfloat16 block of 128, contiguous, 16 bytes a thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.language import LOG2_E, dot, like, rounded
from slipstream.kernels.gpu.tuning import Tuning
from slipstream.kernels.ops import FLOAT8, VALUE_LIFT, ForwardBatch, Heads

SPLITS_MAX = 32
_LEAST_M = 16
"""Rows of the smallest tile that matrix units take."""


@triton.jit
def _step(
    top, total, out, q, keys, values, table, first, end, position, block_stride, scale,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over N keys from `first` on; with `MASKED` those before `end` alone, and for
    each query those up to its own position."""
    token = first + tl.arange(0, N)
    dim = tl.arange(0, DIM_PADDED)
    if MASKED:
        inside = token < end
        block = tl.load(table + token // BLOCK, mask=inside, other=0)
        real = inside[:, None] & (dim < DIM)[None, :]
    else:
        block = tl.load(table + token // BLOCK)
        real = tl.broadcast_to((dim < DIM)[None, :], [N, DIM_PADDED])
    at = block.to(tl.int64) * block_stride + (token % BLOCK) * DIM
    at = at[:, None] + dim[None, :]
    if MASKED or DIM != DIM_PADDED:
        key = tl.load(keys + at, mask=real, other=0.0)
        value = tl.load(values + at, mask=real, other=0.0)
    else:
        key, value = tl.load(keys + at), tl.load(values + at)
    none = tl.zeros([q.shape[0], N], tl.float32)
    scores = dot(q, tl.trans(like(key, q)), none) * scale
    if MASKED:
        visible = inside[None, :] & (token[None, :] <= position[:, None])
        scores = tl.where(visible, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing is visible yet
    weights = tl.exp2(scores - finite[:, None])
    kept = tl.exp2(top - finite)
    total = total * kept + tl.sum(weights, 1)
    out = dot(rounded(weights, q.dtype), like(value, q), out * kept[:, None])
    return new_top, total, out


@triton.jit
def _walk(
    q, keys, values, table, low, whole, high, position, block_stride, scale,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The softmax's state after keys `low` .. `high`; those before `whole` are seen by all."""
    top = tl.full([q.shape[0]], -float("inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    out = tl.zeros([q.shape[0], DIM_PADDED], tl.float32)
    plain = low + tl.maximum(tl.minimum(whole, high) - low, 0) // N * N
    for first in range(low, plain, N):
        top, total, out = _step(
            top, total, out, q, keys, values, table, first, high, position, block_stride, scale,
            BLOCK, DIM, DIM_PADDED, N, False,
        )  # fmt: skip
    for first in range(plain, high, N):
        top, total, out = _step(
            top, total, out, q, keys, values, table, first, high, position, block_stride, scale,
            BLOCK, DIM, DIM_PADDED, N, True,
        )  # fmt: skip
    return top, total, out


@triton.jit
def _row_of(tile, starts, rows, QUERIES: tl.constexpr):
    """Row `r` has the tiles from `starts[r] // QUERIES + r` on: enough, and known without a look
    at the others."""
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _chunks(
    qkv, qkv_stride, keys, values, block_stride, tables, table_stride, starts, contexts, rows,
    out, scale, lift,
    HEADS: tl.constexpr, GROUP: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One tile of one row's queries. The last ones, which see most, go first."""
    QUERIES: tl.constexpr = M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row = _row_of(tile, starts, rows, QUERIES)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    first = (tile - (start // QUERIES + row)) * QUERIES
    if (first >= count) | (count <= FEW):
        return
    context = tl.load(contexts + row)
    member = tl.arange(0, M)
    query = first + member // GROUP
    mine = (query < count) & (member < QUERIES * GROUP)
    head = kv_head * GROUP + member % GROUP
    dim = tl.arange(0, DIM_PADDED)
    real = mine[:, None] & (dim < DIM)[None, :]
    token = (start + query).to(tl.int64)[:, None]
    q = tl.load(qkv + token * qkv_stride + head[:, None] * DIM + dim[None, :], mask=real, other=0.0)
    before = context - count
    _, total, result = _walk(
        q, keys + kv_head * BLOCK * DIM, values + kv_head * BLOCK * DIM,
        tables + row * table_stride, 0, before + first + 1,
        tl.minimum(context, before + first + QUERIES), before + query, block_stride, scale,
        BLOCK, DIM, DIM_PADDED, N,
    )  # fmt: skip
    result = result / (tl.where(total > 0, total, 1.0) * lift)[:, None]
    at = token * (HEADS * DIM) + head[:, None] * DIM + dim[None, :]
    tl.store(out + at, rounded(result, out.dtype.element_ty), mask=real)


@triton.jit
def _share(context, N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Keys of one split, a multiple of N."""
    each = (context + SPLITS - 1) // SPLITS
    return tl.maximum((each + N - 1) // N * N, LEAST)


@triton.jit
def _splits(
    qkv, qkv_stride, keys, values, block_stride, tables, table_stride, starts, contexts,
    out, parts, scale, lift,
    HEADS: tl.constexpr, GROUP: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """All queries of a row that has few, over one share of its context.

    The only share's result goes to `out`; of several to `parts`, float32
    `[rows, FEW, HEADS, SPLITS, DIM_PADDED + 2]`, with the largest score and the sum behind it.
    """
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    context = tl.load(contexts + row)
    share = _share(context, N, SPLITS, LEAST)
    low = split * share
    if (count > FEW) | ((low >= context) & (split > 0)):
        return
    member = tl.arange(0, M)
    query = member // GROUP
    mine = query < count
    head = kv_head * GROUP + member % GROUP
    dim = tl.arange(0, DIM_PADDED)
    real = mine[:, None] & (dim < DIM)[None, :]
    token = (start + query).to(tl.int64)[:, None]
    q = tl.load(qkv + token * qkv_stride + head[:, None] * DIM + dim[None, :], mask=real, other=0.0)
    before = context - count
    top, total, result = _walk(
        q, keys + kv_head * BLOCK * DIM, values + kv_head * BLOCK * DIM,
        tables + row * table_stride, low, before + 1, tl.minimum(low + share, context),
        before + query, block_stride, scale, BLOCK, DIM, DIM_PADDED, N,
    )  # fmt: skip
    if SPLITS == 1:
        result = result / (tl.where(total > 0, total, 1.0) * lift)[:, None]
        at = token * (HEADS * DIM) + head[:, None] * DIM + dim[None, :]
        tl.store(out + at, rounded(result, out.dtype.element_ty), mask=real)
    else:
        part = ((row * FEW + query) * HEADS + head) * SPLITS + split
        part = part.to(tl.int64) * (DIM_PADDED + 2)
        tl.store(parts + part[:, None] + dim[None, :], result, mask=mine[:, None])
        tl.store(parts + part + DIM_PADDED, top, mask=mine)
        tl.store(parts + part + DIM_PADDED + 1, total, mask=mine)


@triton.jit
def _merge(
    parts, starts, contexts, out, lift,
    HEADS: tl.constexpr, FEW: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """The shares of one query and head put together."""
    head, query, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    if (query >= count) | (count > FEW):
        return
    context = tl.load(contexts + row)
    share = _share(context, N, SPLITS, LEAST)
    split = tl.arange(0, SPLITS)
    there = (split * share < context) | (split == 0)
    dim = tl.arange(0, DIM_PADDED)
    part = ((row * FEW + query) * HEADS + head) * SPLITS + split
    part = part.to(tl.int64) * (DIM_PADDED + 2)
    each = tl.load(parts + part[:, None] + dim[None, :], mask=there[:, None], other=0.0)
    top = tl.load(parts + part + DIM_PADDED, mask=there, other=-float("inf"))
    total = tl.load(parts + part + DIM_PADDED + 1, mask=there, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(total * weight, 0)
    result = tl.sum(each * weight[:, None], 0) / (tl.where(total > 0, total, 1.0) * lift)
    at = (start + query).to(tl.int64) * (HEADS * DIM) + head * DIM + dim
    tl.store(out + at, rounded(result, out.dtype.element_ty), mask=dim < DIM)


def few_queries(group: int) -> int:
    """As many queries of one row as the smallest tile has room for."""
    tile: int = max(_LEAST_M, triton.next_power_of_2(group))
    return tile // group


def num_splits(rows: int, kv_heads: int, programs: int) -> int:
    """Shares of a context that give the card `programs`, a power of two; short contexts use fewer.

    Some for each place on the card, so that the last round of them is not nearly empty. Known from
    shapes alone: a graph that was captured serves contexts of any length.
    """
    wanted = max(1, programs // max(1, rows * kv_heads))
    splits: int = triton.next_power_of_2(wanted)
    return min(SPLITS_MAX, splits)


def attention(
    qkv: Tensor, pool: Tensor, layer: int, batch: ForwardBatch, heads: Heads, tuning: Tuning
) -> Tensor:
    """Of rotated queries in `qkv`, `[T, (query + 2 kv) * dim]`: `[T, query * dim]` in its dtype.

    Keys and values of the batch are in the pool already. Rows of padding (`ops.ForwardBatch`) get
    zeros.
    """
    tokens, rows = len(qkv), len(batch.context_lengths)
    out = torch.empty(tokens, heads.query * heads.dim, dtype=qkv.dtype, device=qkv.device)
    group = heads.query // heads.kv
    few = few_queries(group)
    assert qkv.stride(1) == 1 and pool.is_contiguous() and batch.block_tables.stride(1) == 1
    shape = {
        "HEADS": heads.query,
        "GROUP": group,
        "FEW": few,
        "BLOCK": pool.shape[4],
        "DIM": heads.dim,
        "DIM_PADDED": max(_LEAST_M, triton.next_power_of_2(heads.dim)),
    }
    tables = batch.block_tables, batch.block_tables.stride(0)
    lengths = batch.query_starts, batch.context_lengths
    inputs = qkv, qkv.stride(0), pool[:, layer, 0], pool[:, layer, 1], pool.stride(0)
    factors = heads.dim**-0.5 * LOG2_E.value, VALUE_LIFT if pool.dtype == FLOAT8 else 1.0
    size = {"head_dim": heads.dim, "kv_bytes": pool.element_size(), "group": group}
    if rows > 1 or tokens <= few:
        _decode(inputs, tables, lengths, out, factors, shape, heads.kv, tuning, size)
    if tokens > rows and tokens > few:
        chosen = tuning.choose("chunks", tokens=tokens // rows, **size)
        m = max(chosen.pop("M"), triton.next_power_of_2(group))
        grid = (tokens // (m // group) + rows, heads.kv)
        _chunks[grid](*inputs, *tables, *lengths, rows, out, *factors, **shape, M=m, **chosen)
    return out


def _decode(
    inputs: tuple[Tensor | int, ...],
    tables: tuple[Tensor, int],
    lengths: tuple[Tensor, Tensor],
    out: Tensor,
    factors: tuple[float, float],
    shape: dict[str, int],
    kv_heads: int,
    tuning: Tuning,
    size: dict[str, int],
) -> None:
    rows = len(lengths[1])
    chosen = tuning.choose("splits", rows=rows, **size)
    splits = num_splits(rows, kv_heads, tuning.processors * chosen.pop("PROGRAMS"))
    few, heads, padded = shape["FEW"], shape["HEADS"], shape["DIM_PADDED"]
    parts = out
    if splits > 1:
        each = rows, few, heads, splits, padded + 2
        parts = torch.empty(each, dtype=torch.float32, device=out.device)
    m = max(_LEAST_M, triton.next_power_of_2(shape["GROUP"]))
    _splits[(kv_heads, splits, rows)](
        *(*inputs, *tables, *lengths, out, parts, *factors),
        **shape,
        M=m,
        SPLITS=splits,
        **chosen,
    )
    if splits > 1:
        merged = {name: shape[name] for name in ("HEADS", "FEW", "DIM", "DIM_PADDED")}
        split = {"N": chosen["N"], "SPLITS": splits, "LEAST": chosen["LEAST"]}
        _merge[(heads, few, rows)](parts, *lengths, out, factors[1], **merged, **split)
