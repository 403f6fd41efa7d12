"""Kernels that go over rows once: norms, gates, rotation, and rows as float8.

All of them move bytes: what is read and written once is their floor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.language import INTERPRETED, dot, rounded
from slipstream.kernels.ops import FLOAT8, FLOAT8_MAX, VALUE_LIFT, Heads, rotation_block

_HEADS_AT_A_TIME = 64 if INTERPRETED else 16
_LEAST_HALF = 16
"""Of a head, so that matrix units take it."""
_GATED_AT_A_TIME = 1024


@triton.jit
def _rms_norm(
    x, weight, residual, out, width, epsilon, SUM: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """One row. With `SUM` x is added to the residual first, which is rounded then."""
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, PADDED)
    column = tl.arange(0, PADDED)
    real = column < width
    dtype: tl.constexpr = x.dtype.element_ty
    wide = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if SUM:
        summed = rounded(wide + tl.load(residual + at, mask=real, other=0.0).to(tl.float32), dtype)
        tl.store(residual + at, summed, mask=real)
        wide = summed.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    normed = rounded(wide * root, dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(normed * factor, dtype), mask=real)


@triton.jit
def _gate(x, out, width, TILE: tl.constexpr):
    """`silu(gate) * up` of one row `[gate | up]`, silu rounded as if it were stored."""
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = column < width
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    gate = tl.load(x + row * 2 * width + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=real, other=0.0).to(tl.float32)
    silu = rounded(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32)
    tl.store(out + row * width + column, rounded(silu * up, dtype), mask=real)


@triton.jit
def _normed(
    first, second, weight, column, real, epsilon,
    DIM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Both halves of some heads, normalised and weighted."""
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM
    root = tl.rsqrt(mean + epsilon)[:, None]
    low = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    high = tl.load(weight + DIM // 2 + column, mask=real, other=0.0).to(tl.float32)[None, :]
    first = rounded(rounded(first * root, dtype).to(tl.float32) * low, dtype).to(tl.float32)
    second = rounded(rounded(second * root, dtype).to(tl.float32) * high, dtype).to(tl.float32)
    return first, second


@triton.jit
def _turned(x, dtype: tl.constexpr, SIZE: tl.constexpr, TURN: tl.constexpr):
    """Rows `[heads, SIZE]` of `dtype`, each block of TURN turned by Hadamard's matrix: float32.

    It has 1 where two indices have an even number of bits in common, else -1.
    """
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    common = (row & column) % TURN
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    sign = tl.where(row // TURN == column // TURN, 1.0 - 2.0 * (common & 1).to(tl.float32), 0.0)
    return dot(x, sign.to(dtype), tl.zeros([x.shape[0], SIZE], tl.float32))


@triton.jit
def _rotate(
    qkv, qkv_stride, cosine, sine, slots, keys, values, block_stride, query_norm, key_norm,
    epsilon, turn_scale, value_lift,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr, AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: queries in place, keys and values to the token's slot."""
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_A_TIME + tl.arange(0, AT_A_TIME)
    column = tl.arange(0, HALF_PADDED)
    real = column < HALF
    both = (head < HEADS + 2 * KV_HEADS)[:, None] & real[None, :]
    dtype: tl.constexpr = qkv.dtype.element_ty
    at = qkv + token * qkv_stride + head[:, None] * DIM + column[None, :]
    raw_first = tl.load(at, mask=both, other=0.0)
    raw_second = tl.load(at + HALF, mask=both, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    is_query = (head < HEADS)[:, None]
    if NORM:
        query = _normed(first, second, query_norm, column, real, epsilon, DIM, dtype)
        key = _normed(first, second, key_norm, column, real, epsilon, DIM, dtype)
        first = tl.where(is_query, query[0], key[0])
        second = tl.where(is_query, query[1], key[1])
    cos = tl.load(cosine + token * HALF + column, mask=real, other=0.0)[None, :]
    sin = tl.load(sine + token * HALF + column, mask=real, other=0.0)[None, :]
    turned_first = rounded(first * cos - second * sin, dtype)
    turned_second = rounded(second * cos + first * sin, dtype)
    if TURN:
        first = _turned(turned_first, dtype, HALF_PADDED, TURN) * turn_scale
        second = _turned(turned_second, dtype, HALF_PADDED, TURN) * turn_scale
        tl.store(at, rounded(first, dtype), mask=both & is_query)
        tl.store(at + HALF, rounded(second, dtype), mask=both & is_query)
    else:
        first, second = turned_first.to(tl.float32), turned_second.to(tl.float32)
        tl.store(at, turned_first, mask=both & is_query)
        tl.store(at + HALF, turned_second, mask=both & is_query)
    slot = tl.load(slots + token)
    if slot >= 0:
        stored: tl.constexpr = keys.dtype.element_ty
        inside = (slot // BLOCK) * block_stride + (slot % BLOCK) * DIM + column[None, :]
        key_at = keys + inside + (head - HEADS)[:, None] * (BLOCK * DIM)
        is_key = both & ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
        tl.store(key_at, rounded(first, stored), mask=is_key)
        tl.store(key_at + HALF, rounded(second, stored), mask=is_key)
        value_at = values + inside + (head - HEADS - KV_HEADS)[:, None] * (BLOCK * DIM)
        is_value = both & (head >= HEADS + KV_HEADS)[:, None]
        value_first = raw_first.to(tl.float32) * value_lift
        value_second = raw_second.to(tl.float32) * value_lift
        tl.store(value_at, rounded(value_first, stored), mask=is_value)
        tl.store(value_at + HALF, rounded(value_second, stored), mask=is_value)


@triton.jit
def _quantize(x, levels, scales, width, stride, PADDED: tl.constexpr):
    """One row as float8 and its scale; zeros behind it up to `stride`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    wide = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), 1e-30) / 448.0
    level = rounded(wide / scale, levels.dtype.element_ty)
    tl.store(levels + row * stride + column, level, mask=column < stride)
    tl.store(scales + row, scale)


def _warps(padded: int) -> int:
    """Of a row: 16 bytes a thread of bfloat16 at least."""
    return max(1, min(16, padded // 512))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> Tensor:
    """As `ops.Ops.rms_norm`; x `[rows, width]`, contiguous."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(x.shape[1])
    _rms_norm[(len(x),)](
        *(x, weight, x if residual is None else residual, out, x.shape[1], epsilon),
        SUM=residual is not None,
        PADDED=padded,
        num_warps=_warps(padded),
    )
    return out


def gate(x: Tensor) -> Tensor:
    """`silu(x[:, :width]) * x[:, width:]` of `[rows, 2 * width]`, contiguous."""
    assert x.is_contiguous()
    width = x.shape[1] // 2
    out = torch.empty(len(x), width, dtype=x.dtype, device=x.device)
    grid = (len(x), triton.cdiv(width, _GATED_AT_A_TIME))
    _gate[grid](x, out, width, TILE=_GATED_AT_A_TIME, num_warps=4)
    return out


def rotate(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    slots: Tensor,
    pool: Tensor,
    layer: int,
    heads: Heads,
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
) -> None:
    """Queries in `qkv` and the batch's slots in the pool are as `ops.Ops.attention` says."""
    assert qkv.stride(1) == 1 and pool.is_contiguous()
    assert cosine.is_contiguous() and sine.is_contiguous()
    query_norm, key_norm = norms or (cosine, cosine)
    turn = rotation_block(heads.dim // 2) if pool.dtype == FLOAT8 else 0
    all_heads = heads.query + 2 * heads.kv
    _rotate[(len(qkv), triton.cdiv(all_heads, _HEADS_AT_A_TIME))](
        *(qkv, qkv.stride(0), cosine, sine, slots, pool[:, layer, 0], pool[:, layer, 1]),
        *(pool.stride(0), query_norm, key_norm, epsilon, 1 / max(1, turn) ** 0.5),
        VALUE_LIFT if turn else 1.0,
        HEADS=heads.query,
        KV_HEADS=heads.kv,
        DIM=heads.dim,
        HALF_PADDED=max(_LEAST_HALF, triton.next_power_of_2(heads.dim // 2)),
        BLOCK=pool.shape[4],
        NORM=norms is not None,
        TURN=turn,
        AT_A_TIME=_HEADS_AT_A_TIME,
        num_warps=2,
    )


def quantize(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_float8`, with zeros behind each row up to `width`."""
    assert x.is_contiguous()
    levels = torch.empty(len(x), width, dtype=FLOAT8, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(width)
    _quantize[(len(x),)](
        *(x, levels, scales, x.shape[1], width), PADDED=padded, num_warps=_warps(padded)
    )
    return levels, scales


assert FLOAT8_MAX == 448.0, "the kernels say so themselves"
