"""Matrices as the CPU's compiled kernels read them: outputs side by side in panels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.kernels.levels import ROWS_AT_A_TIME
from slipstream.kernels.ops import quantize, rotation_block

PANEL = 16
"""Outputs of a matrix that lie side by side; all dimensions are multiples of it, or padded."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in panels: `[outputs / 16, inputs / G, 16, G]`, G elements in 32 bits."""

    panels: Tensor
    bias: Tensor | None
    outputs: int
    inputs: int
    scale: Tensor | None = None
    """Of int8 panels: float32, one for each output."""
    sums: Tensor | None = None
    """Of int8 panels: int32, of each output's weights; what 128 too much in each input adds."""
    turned: bool = True
    """Of int8 panels: they are rotated."""


def in_panels(weight: Tensor) -> Tensor:
    """`[out, in]` -> panels, the last one filled up with zeros."""
    outputs, inputs = weight.shape
    group = 4 // weight.element_size()
    if inputs % PANEL:
        raise ValueError(f"{inputs} inputs are no multiple of {PANEL}")
    padded = torch.zeros(-(-outputs // PANEL) * PANEL, inputs, dtype=weight.dtype)
    padded[:outputs] = weight
    return padded.view(-1, PANEL, inputs // group, group).transpose(1, 2).contiguous()


def plain(weight: Tensor, bias: Tensor | None) -> Packed:
    return Packed(in_panels(weight), bias, *weight.shape)


def quantized(weight: Tensor, bias: Tensor | None) -> Packed:
    """As int8, rotated: see `ops.quantize`."""
    outputs, inputs = weight.shape
    levels, scale = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs, 1)
    for first in range(0, outputs, ROWS_AT_A_TIME):
        part = slice(first, first + ROWS_AT_A_TIME)
        levels[part], scale[part] = quantize(weight[part])
    return of_bytes(levels, scale / rotation_block(inputs), bias, turned=True)


def of_bytes(levels: Tensor, scale: Tensor, bias: Tensor | None, turned: bool) -> Packed:
    """Of int8 `[out, in]` and scales `[out, 1]`."""
    outputs, inputs = levels.shape
    panels = in_panels(levels)
    scales = torch.zeros(len(panels) * PANEL)
    scales[:outputs] = scale.flatten()
    sums = torch.zeros(len(panels) * PANEL, dtype=torch.int32)
    sums[:outputs] = levels.sum(1, dtype=torch.int32)
    return Packed(panels, bias, outputs, inputs, scales, sums, turned)


def by_turns(outputs: int) -> Tensor:
    """Rows of `[gate | up]`: a panel of the one, a panel of the other."""
    return torch.arange(outputs).view(2, -1, PANEL).transpose(0, 1).flatten()
