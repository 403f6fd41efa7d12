"""What adapters add to a matrix, as the CPU's compiled kernels read it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.ops import LowRank
from slipstream.kernels.panels import PANEL, by_turns, in_panels


class PackedLowRank(NamedTuple):
    """`kept`: what the row, of `Adapter` in `cpu_adapters.h`, points to."""

    row: Tensor
    kept: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self.kept)


class CpuAdapters:
    """A table that programs read at each step, whose rows are written between them."""

    def __init__(self, parts: Sequence[int], places: int, rank: int, gated: bool) -> None:
        if any(size % PANEL for size in parts):
            raise ValueError(f"parts of {list(parts)} outputs: {PANEL} divides them not")
        self._parts, self._gated = len(parts), gated
        panels = [size // PANEL for size in parts]
        owners = (
            [0, 1] * panels[0] if gated else [i for i, n in enumerate(panels) for _ in range(n)]
        )
        self.part_of = torch.tensor(owners, dtype=torch.int32)
        """Of each panel of outputs."""
        self.width = len(parts) * _padded(rank)
        """Of what `down` yields, at most."""
        self.table = torch.zeros(places, 6, dtype=torch.int64)
        self._kept: dict[int, PackedLowRank] = {}

    def pack(self, low: LowRank) -> PackedLowRank:
        rank = low.up.shape[1]
        padded = _padded(rank)
        down = low.down.view(self._parts, rank, -1)
        down = in_panels(F.pad(down, (0, 0, 0, padded - rank)).flatten(0, 1))
        up = low.up[by_turns(len(low.up))] if self._gated else low.up
        up = up.reshape(-1, PANEL, rank).transpose(1, 2).contiguous()
        scale = low.scale.repeat_interleave(padded).contiguous()
        pointers = [each.data_ptr() for each in (down, up, scale)]
        row = torch.tensor([*pointers, rank, padded, self._parts * padded // PANEL])
        return PackedLowRank(row, (down, up, scale))

    def put(self, place: int, packed: PackedLowRank | None) -> None:
        if packed is None:
            self.table[place] = 0
            self._kept.pop(place, None)
        else:
            self.table[place] = packed.row
            self._kept[place] = packed


def _padded(rank: int) -> int:
    return -(-rank // PANEL) * PANEL
