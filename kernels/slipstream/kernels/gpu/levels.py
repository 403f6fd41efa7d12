"""Products with matrices of quantized checkpoints, which are made plain on their way.

One kernel for 4 bits, int8 and float8 (`kernels.levels`): levels come from memory as they are, and
become numbers of the activations' dtype in registers. Few rows read the matrix and nothing else.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.language import dot, rounded
from slipstream.kernels.levels import NIBBLES, Levels

PROGRAMS = 4
"""For each multiprocessor, that few rows are divided into."""
SPLITS_MAX = 8


class Tile(NamedTuple):
    """`m` rows by `n` outputs by `k` bytes of levels at a time."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


_FEW, _SOME, _MANY = Tile(16, 32, 64, 4, 5), Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 8, 3)
_FLOAT32 = Tile(16, 32, 32, 4, 1)
"""For exactness, not speed: operands lie in registers."""


@triton.jit
def _factors(at, zero_at, real, ZERO: tl.constexpr, MIDDLE: tl.constexpr):
    """Scales and zero points, float32."""
    scale = tl.load(at, mask=real, other=0.0).to(tl.float32)
    if ZERO:
        zero = tl.load(zero_at, mask=real, other=0).to(tl.float32)
    else:
        zero = tl.zeros_like(scale) + MIDDLE
    return scale, zero


@triton.jit
def _product(
    x, levels, scale, zero, bias, out, rows, outputs, inputs, x_stride, width,
    GROUP: tl.constexpr, HALVES: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
    SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of `x @ weight.T`, of one of SPLITS shares of the inputs."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    there, real = row < rows, column < outputs
    dtype: tl.constexpr = x.dtype.element_ty
    EACH: tl.constexpr = 2 * K if HALVES else K  # inputs of a tile
    MIDDLE: tl.constexpr = 8.0 if HALVES else 0.0
    share = tl.cdiv(tl.cdiv(width, K), SPLITS)
    begin = tl.program_id(2) * share
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    of_column = levels + column.to(tl.int64)[None, :] * width
    total = tl.zeros([M, N], tl.float32)
    for step in range(begin, begin + share):
        byte = step * K + tl.arange(0, K)
        low = (byte // 16) * 32 + byte % 16 if HALVES else byte
        inside = low < inputs
        if GROUP % EACH == 0:  # all of the tile is in one group
            at = column[None, :]
            if GROUP:
                at += tl.minimum(step * EACH // GROUP, (inputs - 1) // GROUP) * outputs
            factor, middle = _factors(scale + at, zero + at, real[None, :], ZERO, MIDDLE)
        else:
            at = (low // GROUP)[:, None] * outputs + column[None, :]
            known = inside[:, None] & real[None, :]
            factor, middle = _factors(scale + at, zero + at, known, ZERO, MIDDLE)
        held = inside[:, None] & real[None, :]
        first = tl.load(x_row + low[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        if HALVES:
            packed = tl.load(of_column + byte[:, None], mask=held, other=0).to(tl.int32)
            # In the last bits of 2 ** 23 a level is itself: no conversion is needed.
            level = ((packed & 15) | 0x4B000000).to(tl.float32, bitcast=True)
            weight = (level - (8388608.0 + middle)) * factor
            total = dot(first, rounded(weight, dtype), total)
            high = low + 16
            seen = there[:, None] & (high < inputs)[None, :]
            second = tl.load(x_row + high[None, :], mask=seen, other=0.0)
            level = ((packed >> 4) | 0x4B000000).to(tl.float32, bitcast=True)
            weight = (level - (8388608.0 + middle)) * factor
            total = dot(second, rounded(weight, dtype), total)
        else:
            level = tl.load(of_column + byte[:, None], mask=held).to(tl.float32)
            weight = tl.where(held, (level - middle) * factor, 0.0)
            total = dot(first, rounded(weight, dtype), total)
    if BIAS:
        total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * outputs + column[None, :]
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=there[:, None] & real[None, :])


@dataclass(frozen=True, slots=True)
class Grouped:
    """`Levels` as the kernel reads them."""

    levels: Tensor
    scale: Tensor
    """`[groups, out]`"""
    zero: Tensor | None
    bias: Tensor | None
    inputs: int
    group: int
    """0: all inputs"""
    order: Tensor | None
    processors: int
    """Of the card."""

    def times(self, x: Tensor) -> Tensor:
        return self._product(x, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self._product(x, torch.float32)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.order is not None:
            x = x.index_select(1, self.order)
        assert x.stride(1) == 1 and x.shape[1] == self.inputs
        rows, outputs = len(x), self.scale.shape[1]
        tile = _tile(rows, x.dtype)
        splits = 1 if rows > _FEW.m else self._splits(tile)
        of = dtype if splits == 1 else torch.float32
        out = torch.empty(splits, rows, outputs, dtype=of, device=x.device)
        bias = self.bias if splits == 1 else None
        grid = triton.cdiv(rows, tile.m), triton.cdiv(outputs, tile.n), splits
        _product[grid](
            *(x, self.levels, self.scale, self.scale if self.zero is None else self.zero),
            *(x if bias is None else bias, out, rows, outputs, self.inputs),
            *(x.stride(0), self.levels.shape[1]),
            GROUP=self.group,
            HALVES=self.levels.dtype == torch.uint8,
            ZERO=self.zero is not None,
            BIAS=bias is not None,
            SPLITS=splits,
            M=tile.m,
            N=tile.n,
            K=tile.k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if splits == 1:
            return out[0]
        total = out.sum(0)  # in one order, whatever comes first
        return (total if self.bias is None else total + self.bias).to(dtype)

    def _splits(self, tile: Tile) -> int:
        """Shares of the inputs that give the card enough programs; known from the matrix alone."""
        steps: int = triton.cdiv(self.levels.shape[1], tile.k)
        columns: int = triton.cdiv(self.scale.shape[1], tile.n)
        wanted = PROGRAMS * self.processors // columns
        return max(1, min(SPLITS_MAX, wanted, steps))


def grouped(levels: Levels, bias: Tensor | None, processors: int) -> Grouped | None:
    """None: there is no kernel for groups of that size."""
    group = 0 if levels.group >= levels.inputs else levels.group
    if group % (2 * NIBBLES if levels.bits == 4 else 1):
        return None
    zero = None if levels.zero is None else levels.zero.t().contiguous()
    scale = levels.scale.t().contiguous()
    parts = levels.levels.contiguous(), scale, zero, bias
    return Grouped(*parts, levels.inputs, group, levels.order, processors)


def _tile(rows: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return _FLOAT32
    return _FEW if rows <= _FEW.m else _SOME if rows <= 2 * _SOME.m else _MANY
