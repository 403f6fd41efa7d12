"""What adapters add to a product: two thin products for each tile of rows, one adapter of the tile
after the other.

Rows of other adapters count as zeros meanwhile, so a row comes out the same whoever shares its
tile. Where weights lie is read from a table on the device: a launch does not know who is there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.language import dot, rounded
from slipstream.kernels.ops import LowRank

_TILE = 16
_COLUMNS = 64
_SPLIT = 1024
"""Inputs that one program sums: few tokens have few programs else."""
_STEP = 128
_LEAST_RANK = 16


@triton.jit
def _shrink(
    x, table, places, out, rows, inputs, width,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`x @ down.T` of a tile, over some of the inputs: float32 `[splits, rows, width]`."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2) * SPLIT
    left = tl.load(places + row, mask=row < rows, other=-1)
    dtype: tl.constexpr = x.dtype.element_ty
    wanted = left >= 0
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    place = tl.max(left, 0)
    while place >= 0:
        entry = table + place.to(tl.int64) * 4
        down = tl.load(entry).to(tl.pointer_type(dtype))
        real = column < tl.load(entry + 3)
        own = left == place
        for begin in range(first, tl.minimum(first + SPLIT, inputs), STEP):
            k = begin + tl.arange(0, STEP)
            inside = k < inputs
            at = row[:, None].to(tl.int64) * inputs + k[None, :]
            mine = tl.load(x + at, mask=own[:, None] & inside[None, :], other=0.0)
            weight_at = column[None, :].to(tl.int64) * inputs + k[:, None]
            weight = tl.load(down + weight_at, mask=real[None, :] & inside[:, None], other=0.0)
            total = dot(mine, weight, total)
        left = tl.where(own, -1, left)
        place = tl.max(left, 0)
    at = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * width + column[None, :]
    tl.store(out + at, total, mask=wanted[:, None] & (column < width)[None, :])


@triton.jit
def _expand(
    x, shrunk, table, scales, places, blocks, out, rows, width, outputs, parts,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Adds to some columns of a tile, all of one part, what its adapters make of `shrunk`; of `x`
    the dtype alone counts, which is the adapters'."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    block = blocks + tl.program_id(1) * 3
    column = tl.load(block) + tl.arange(0, COLUMNS)
    inside = column < tl.load(block + 1)
    part = tl.load(block + 2)
    left = tl.load(places + row, mask=row < rows, other=-1)
    dtype: tl.constexpr = x.dtype.element_ty
    wanted = left >= 0
    k = tl.arange(0, RANK)
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    place = tl.max(left, 0)
    while place >= 0:
        entry = table + place.to(tl.int64) * 4
        up = tl.load(entry + 1).to(tl.pointer_type(dtype))
        rank = tl.load(entry + 2)
        scale = tl.load(scales + place * parts + part)
        own = left == place
        real = k < rank
        inner = tl.zeros([TILE, RANK], tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * rows + row[:, None]).to(tl.int64) * width + part * rank + k[None, :]
            inner += tl.load(shrunk + at, mask=own[:, None] & real[None, :], other=0.0)
        weight_at = column[None, :].to(tl.int64) * rank + k[:, None]
        weight = tl.load(up + weight_at, mask=real[:, None] & inside[None, :], other=0.0)
        total = dot(inner * scale, weight.to(tl.float32), total)
        left = tl.where(own, -1, left)
        place = tl.max(left, 0)
    at = row[:, None].to(tl.int64) * outputs + column[None, :]
    mask = wanted[:, None] & inside[None, :]
    base = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(base + total, out.dtype.element_ty), mask=mask)


class PackedLowRank(NamedTuple):
    low: LowRank
    entry: Tensor

    @property
    def num_bytes(self) -> int:
        return self.low.num_bytes


class TritonAdapters:
    """Of one matrix `[sum(parts), inputs]`."""

    def __init__(
        self, parts: Sequence[int], inputs: int, places: int, rank: int, device: torch.device
    ) -> None:
        self._parts, self._inputs, self._device = len(parts), inputs, device
        self._width, self._rank = len(parts) * rank, rank
        blocks, start = [], 0
        for part, size in enumerate(parts):
            blocks += [(at, start + size, part) for at in range(start, start + size, _COLUMNS)]
            start += size
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
        self._table = torch.zeros(places, 4, dtype=torch.int64, device=device)
        """Where `down` and `up` lie, the rank, and that of all parts; zeros: nothing is added."""
        self._scales = torch.zeros(places, len(parts), device=device)
        self._kept: dict[int, PackedLowRank] = {}

    def pack(self, low: LowRank) -> PackedLowRank:
        low = LowRank(*(each.to(self._device).contiguous() for each in low))
        rank = low.up.shape[1]
        entry = [low.down.data_ptr(), low.up.data_ptr(), rank, self._parts * rank]
        return PackedLowRank(low, torch.tensor(entry).to(self._device))

    def put(self, place: int, packed: PackedLowRank | None) -> None:
        if packed is None:
            self._table[place] = 0
            self._kept.pop(place, None)
        else:
            self._table[place] = packed.entry
            self._scales[place] = packed.low.scale
            self._kept[place] = packed

    def add(self, out: Tensor, x: Tensor, places: Tensor) -> Tensor:
        """To `out`, in place, what the adapters of its rows, int32 `places`, make of `x`."""
        assert x.is_contiguous() and out.is_contiguous() and places.is_contiguous()
        rows, inputs, outputs = len(x), self._inputs, out.shape[1]
        tiles, splits = triton.cdiv(rows, _TILE), triton.cdiv(inputs, _SPLIT)
        shrunk = torch.empty(splits, rows, self._width, dtype=torch.float32, device=x.device)
        columns = min(_COLUMNS, triton.next_power_of_2(max(self._width, _LEAST_RANK)))
        _shrink[(tiles, triton.cdiv(self._width, columns), splits)](
            *(x, self._table, places, shrunk, rows, inputs, self._width),
            TILE=_TILE,
            COLUMNS=columns,
            SPLIT=_SPLIT,
            STEP=_STEP,
            num_warps=4,
        )
        _expand[(tiles, len(self._blocks))](
            *(x, shrunk, self._table, self._scales, places, self._blocks, out),
            *(rows, self._width, outputs, self._parts),
            TILE=_TILE,
            COLUMNS=_COLUMNS,
            SPLITS=splits,
            RANK=max(_LEAST_RANK, triton.next_power_of_2(self._rank)),
            num_warps=4,
        )
        return out
