"""Matrices of quantized checkpoints: one form into which all their formats are brought.

A matrix is levels, and for each output one scale, and perhaps one zero point, for every group of
inputs: `scale * (level - zero)`. What that comes to in plain torch (`Levels.plain`) is the
specification. What the formats look like on disk is known above; kernels know this form alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NIBBLES = 16
"""Bytes that hold 32 inputs of 4 bits: the first 16 in their low halves, the others in the high."""
ROWS_AT_A_TIME = 4096
"""Outputs whose plain weights are made at once: that takes some copies of them in float32."""


@dataclass(frozen=True, slots=True)
class Levels:
    """`[out, in]`, each number rounded to `dtype` once."""

    levels: Tensor
    """int8 or float8 `[out, in]`; of 4 bits as `in_nibbles` packs them"""
    scale: Tensor
    """`[out, groups]`, of any float type"""
    zero: Tensor | None
    """int8 `[out, groups]`; none: 8 of 4 bits, else 0"""
    inputs: int
    group: int
    """Inputs of a group; of the last one there may be fewer"""
    dtype: torch.dtype
    order: Tensor | None = None
    """int64 `[in]`: column i is of input `order[i]`; none: of input i"""
    rows: bool = False
    """What it is multiplied with is quantized as well, row by row: 8 bits, one scale for each
    output, no zero, no order"""

    @property
    def outputs(self) -> int:
        return len(self.scale)

    @property
    def bits(self) -> int:
        return 4 if self.levels.dtype == torch.uint8 else 8

    def plain(self) -> Tensor:
        """`[out, in]` in `dtype`."""
        made = torch.empty(self.outputs, self.inputs, dtype=self.dtype, device=self.scale.device)
        index = torch.arange(self.inputs, device=made.device) // self.group
        to = slice(None) if self.order is None else self.order
        for first in range(0, self.outputs, ROWS_AT_A_TIME):
            part = slice(first, first + ROWS_AT_A_TIME)
            levels = self.levels[part]
            wide = of_nibbles(levels, self.inputs) if self.bits == 4 else levels.float()
            if self.zero is not None:
                wide -= self.zero[part].float()[:, index]
            elif self.bits == 4:
                wide -= 8
            wide *= self.scale[part].float()[:, index]
            made[part, to] = wide.to(self.dtype)
        return made

    def of_outputs(self, cut: slice | Tensor) -> "Levels":
        levels = self.levels.view(torch.uint8)[cut].view(self.levels.dtype)
        zero = None if self.zero is None else self.zero[cut]
        return replace(self, levels=levels, scale=self.scale[cut], zero=zero)

    def of_inputs(self, cut: slice) -> "Levels | None":
        """None: the cut begins inside of a group, or of 16 bytes."""
        apart = self.group < self.inputs and cut.start % self.group
        if self.order is not None or apart or (self.bits == 4 and cut.start % 32):
            return None
        first, end = cut.start, cut.stop
        if self.bits == 4:
            first, end = first // 2, -(-end // 32) * NIBBLES
        groups = slice(cut.start // self.group, -(-cut.stop // self.group))
        return replace(
            self,
            levels=self.levels[:, first:end].contiguous(),
            scale=self.scale[:, groups].contiguous(),
            zero=None if self.zero is None else self.zero[:, groups].contiguous(),
            inputs=cut.stop - cut.start,
            group=min(self.group, cut.stop - cut.start),
        )


def together(parts: Sequence[Levels]) -> Levels | None:
    """One under the other; None: they are not of one kind."""
    one = parts[0]

    def alike(other: Levels) -> bool:
        kinds = (
            (each.levels.dtype, each.group, each.zero is None, each.rows, each.order is None)
            for each in (one, other)
        )
        if len(set(kinds)) > 1:
            return False
        return one.order is None or other.order is None or torch.equal(one.order, other.order)

    if not all(map(alike, parts)):
        return None
    widest = max((each.scale.dtype for each in parts), key=lambda dtype: dtype.itemsize)
    same = all(each.scale.dtype == one.scale.dtype for each in parts)
    scale = torch.cat([each.scale.to(one.scale.dtype if same else widest) for each in parts])
    zeros = [each.zero for each in parts if each.zero is not None]
    # As bytes: not every device joins float8.
    levels = torch.cat([each.levels.view(torch.uint8) for each in parts]).view(one.levels.dtype)
    return replace(one, levels=levels, scale=scale, zero=torch.cat(zeros) if zeros else None)


def in_nibbles(levels: Tensor) -> Tensor:
    """uint8 `[out, in]`, 0 to 15 -> `[out, NIBBLES * ceil(in / 32)]`; see `NIBBLES`."""
    outputs, inputs = levels.shape
    padded = torch.nn.functional.pad(levels, (0, -inputs % 32)).view(outputs, -1, 2, NIBBLES)
    return (padded[:, :, 0] | padded[:, :, 1] << 4).reshape(outputs, -1)


def of_nibbles(packed: Tensor, inputs: int) -> Tensor:
    """What `in_nibbles` packed, float32."""
    outputs = len(packed)
    halves = packed.view(outputs, -1, 1, NIBBLES)
    both = torch.cat((halves & 15, halves >> 4), 2)
    return both.view(outputs, -1)[:, :inputs].float()
