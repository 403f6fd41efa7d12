"""Quantized tensors of a checkpoint -> `Levels`. Only this file knows how they are packed.

- `gptq`: `qweight` int32 `[in * bits / 32, out]`, `qzeros` `[groups, out * bits / 32]`, `scales`
  `[groups, out]`, `g_idx` int32 `[in]`: the group of each input. Lowest bits first.
- `awq`: `qweight` int32 `[in, out / 8]`, `qzeros` `[groups, out / 8]`, `scales` `[groups, out]`. Of
  8 outputs the even ones come first.
- `pack-quantized`: `weight_packed` int32 `[out, in * bits / 32]`, what an int8 is plus half of its
  range; `weight_scale` `[out, groups]`, `weight_zero_point` int32 `[out * bits / 32, groups]`.
- others: `weight` int8 or float8 `[out, in]`, and its scales: one, one for each output, for groups
  of inputs, or for blocks.

Sources: Frantar et al., "GPTQ", 2023, as AutoGPTQ writes it; Lin et al., "AWQ", 2024, as AutoAWQ
does; compressed-tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from slipstream.engine.quantized_config import Number, Scheme
from slipstream.kernels.levels import Levels, in_nibbles
from slipstream.kernels.ops import FLOAT8

PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),
    *("weight_shape", "weight_g_idx", "input_scale", "input_zero_point"),
    "activation_scale",
)
"""Names of what a quantized module has beside `weight` and `bias`. How inputs were scaled when they
were looked at is not used: each row is scaled by itself."""
MARKS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
"""A module with one of them is quantized."""
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where each of 8 outputs lies."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def levels_of(
    tensors: Mapping[str, Tensor],
    method: str,
    scheme: Scheme,
    dtype: torch.dtype,
    rows: Number | None = None,
) -> Levels:
    """`tensors`: of one module, by the last part of their names. `rows`: of which levels the
    products quantize their rows too. ValueError: they contradict each other, or `scheme`."""
    try:
        if "qweight" in tensors:
            read = _awq if method == "awq" else _gptq
            levels, scale, zero, order = read(tensors, scheme)
        else:
            levels, scale, zero, order = _compressed(tensors, scheme)
    except KeyError as error:
        raise ValueError(f"tensor {error.args[0]} is missing") from None
    except RuntimeError as error:  # shapes that do not meet
        raise ValueError(str(error).splitlines()[0]) from None
    outputs, inputs = levels.shape
    is_byte = levels.dtype != torch.uint8
    group = min(scheme.group, inputs) or inputs
    if scale.shape != (outputs, -(-inputs // group)) or scale.dtype not in _FLOATS:
        raise ValueError(
            f"scales are {list(scale.shape)} {scale.dtype}, for {outputs} outputs and groups of "
            f"{group} of {inputs} inputs"
        )
    if zero is not None:
        if zero.shape != scale.shape:
            raise ValueError(f"zero points are {list(zero.shape)}, scales {list(scale.shape)}")
        zero = None if bool((zero == (0 if is_byte else 8)).all()) else zero.contiguous()
    whole = group == inputs and zero is None and order is None
    own = torch.contiguous_format  # what was read may be the file itself, mapped
    return Levels(
        levels.clone(memory_format=own) if is_byte else in_nibbles(levels),
        scale.clone(memory_format=own),
        zero,
        inputs,
        group,
        dtype,
        order,
        rows=whole and is_byte and scheme.rows and scheme.number == rows,
    )


_Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Levels `[out, in]`, of 4 bits 0 to 15, else int8 or float8; scale; zero; order."""


def _gptq(tensors: Mapping[str, Tensor], scheme: Scheme) -> _Parts:
    words, groups = _words(tensors["qweight"]), tensors.get("g_idx")
    bits = scheme.bits
    if groups is not None and len(groups):  # some modules may have others
        bits = 32 * len(words) // len(groups)
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits are not supported (only 4 and 8)")
    levels = _numbers(words.t(), bits)
    zero = _numbers(_words(tensors["qzeros"]), bits).t()
    # As it wraps around where AutoGPTQ computes.
    zero = (zero + scheme.zero_offset) & (2**bits - 1)
    order = _order(groups, levels.shape[1], scheme.group)
    if order is not None:
        levels = levels[:, order]
    return _signed(levels, bits), tensors["scales"].t(), _signed(zero, bits).char(), order


def _awq(tensors: Mapping[str, Tensor], scheme: Scheme) -> _Parts:
    def numbers(words: Tensor) -> Tensor:
        mixed = _numbers(_words(words), 4)
        return mixed.view(len(mixed), -1, 8)[:, :, _AWQ_PLACES].flatten(1).t()

    zero = numbers(tensors["qzeros"]).char()
    return numbers(tensors["qweight"]), tensors["scales"].t(), zero, None


def _compressed(tensors: Mapping[str, Tensor], scheme: Scheme) -> _Parts:
    scale = tensors["weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"]
    zero, order = tensors.get("weight_zero_point"), None
    if "weight_packed" in tensors:
        words, bits = _words(tensors["weight_packed"]), scheme.bits
        outputs, inputs = (int(size) for size in tensors["weight_shape"].tolist())
        if words.shape != (outputs, -(-inputs * bits // 32)):
            raise ValueError(f"{outputs} x {inputs} levels are packed in {list(words.shape)}")
        levels = _numbers(words, bits)[:, :inputs]
        order = _order(tensors.get("weight_g_idx"), inputs, scheme.group)
        if order is not None:
            levels = levels[:, order]
        levels = _signed(levels, bits)
        if zero is not None and zero.dtype == torch.int32:
            zero = _signed(_numbers(zero.t(), bits)[:, :outputs].t(), bits)
        elif zero is not None and bits == 4:
            zero = zero + 8
    else:
        levels = tensors["weight"]
        if levels.dtype not in (torch.int8, FLOAT8):
            raise ValueError(f"weight is {levels.dtype}, which is not supported")
        if scheme.bits == 4:
            raise ValueError("4 bits that are not packed are not supported")
    outputs, inputs = levels.shape
    if zero is not None:
        zero = _spread(zero, outputs, inputs, scheme).char()
    return levels, _spread(scale, outputs, inputs, scheme), zero, order


def _spread(scale: Tensor, outputs: int, inputs: int, scheme: Scheme) -> Tensor:
    """`[out, groups]` of what there is for all, for each output, or for blocks."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(outputs, -1)
    if scale.dim() == 1:
        return scale[:, None]
    if (block := scheme.block_outputs) and len(scale) == -(-outputs // block):
        return scale.repeat_interleave(block, 0)[:outputs]
    return scale


def _order(groups: Tensor | None, inputs: int, group: int) -> Tensor | None:
    """Inputs by their groups; none: they lie so."""
    if groups is None or not len(groups) or bool((groups < 0).any()):
        return None
    if len(groups) != inputs:
        raise ValueError(f"the groups of {len(groups)} inputs are named, of {inputs}")
    wanted = torch.arange(inputs, device=groups.device) // (group or inputs)
    if torch.equal(groups.long(), wanted):
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups.long()[order], wanted):
        raise ValueError(f"groups of inputs are not of {group}")
    return order


def _words(words: Tensor) -> Tensor:
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"packed numbers are {list(words.shape)} {words.dtype}, not rows of int32")
    return words


def _numbers(words: Tensor, bits: int) -> Tensor:
    """uint8, along the columns of int32 `[rows, columns]`."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), -1).flatten(1)


def _signed(numbers: Tensor, bits: int) -> Tensor:
    """Of 8 bits int8, with the middle at 0."""
    return numbers if bits == 4 else (numbers ^ 128).contiguous().view(torch.int8)
