"""The operations on a GPU: Triton's kernels, and the vendor's library for products of matrices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.draw import Draw, Drawn
from slipstream.kernels.gpu import draw as drawing
from slipstream.kernels.gpu import rows
from slipstream.kernels.gpu.adapters import TritonAdapters
from slipstream.kernels.gpu.attention import attention
from slipstream.kernels.gpu.graphs import CudaCapture, Graphs
from slipstream.kernels.gpu.language import INTERPRETED
from slipstream.kernels.gpu.levels import Grouped, grouped
from slipstream.kernels.gpu.tuning import Tuning
from slipstream.kernels.levels import ROWS_AT_A_TIME, Levels
from slipstream.kernels.ops import (
    FLOAT8,
    Experts,
    Forward,
    ForwardBatch,
    Heads,
    Model,
    Quantization,
    fitted_float8,
    has_float8,
)
from slipstream.kernels.reference import moe

_ALIGNED = 16
"""Both sizes of a float8 matrix are multiples of it, or filled up with zeros."""


@dataclass(frozen=True, slots=True)
class Matrix:
    weight: Tensor
    """`[out, in]`"""
    bias: Tensor | None = None
    scale: Tensor | None = None
    """Of float8 weights: float32 `[1, out]`."""
    outputs: int = 0
    """Of float8 weights: those that are no filling."""

    def times(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        levels, scale = rows.quantize(x, self.weight.shape[1])
        if x.is_cuda and x.dtype == torch.bfloat16:
            scales = scale, self.scale
            out = torch._scaled_mm(
                levels, self.weight.t(), *scales, bias=self.bias, out_dtype=x.dtype
            )
        else:
            wide = F.linear(levels.float(), self.weight.float()) * scale * self.scale
            out = (wide if self.bias is None else wide + self.bias).to(x.dtype)
        return out if out.shape[1] == self.outputs else out[:, : self.outputs].contiguous()

    def wide(self, x: Tensor) -> Tensor:
        """In float32, not rounded on the way where the library can do that."""
        if self.scale is not None or not x.is_cuda or x.dtype == torch.float32:
            return self.times(x).float()
        out: Tensor = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return out if self.bias is None else out + self.bias


class TritonOps:
    """One step."""

    def __init__(
        self, batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor, tuning: Tuning
    ) -> None:
        self._batch, self._pool, self._tuning = batch, pool, tuning
        self._cosine, self._sine = cosine, sine
        self._places = batch.adapters

    def embed(self, table: Matrix) -> Tensor:
        return F.embedding(self._batch.tokens, table.weight)

    def take(self, x: Tensor) -> Tensor:
        if self._batch.adapters is not None:
            self._places = self._batch.adapters.index_select(0, self._batch.sample_indices)
        return x.index_select(0, self._batch.sample_indices)

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        return rows.rms_norm(x, weight, epsilon, residual)

    def linear(
        self,
        x: Tensor,
        weights: Matrix | Grouped,
        wide: bool = False,
        adapters: TritonAdapters | None = None,
    ) -> Tensor:
        out = weights.wide(x) if wide else weights.times(x)
        return self._adapted(out, x, adapters)

    def gated(
        self, x: Tensor, weights: Matrix | Grouped, adapters: TritonAdapters | None = None
    ) -> Tensor:
        return rows.gate(self._adapted(weights.times(x), x, adapters))

    def _adapted(self, out: Tensor, x: Tensor, adapters: TritonAdapters | None) -> Tensor:
        if adapters is None or self._places is None:
            return out
        return adapters.add(out, x, self._places)

    def moe(self, x: Tensor, experts: Experts) -> Tensor:
        return moe(x, experts)

    def attention(
        self,
        qkv: Tensor,
        heads: Heads,
        layer: int,
        norms: tuple[Tensor, Tensor] | None,
        epsilon: float,
    ) -> Tensor:
        angles, pool = (self._cosine, self._sine), self._pool
        rows.rotate(qkv, *angles, self._batch.slots, pool, layer, heads, norms, epsilon)
        return attention(qkv, pool, layer, self._batch, heads, self._tuning)


class TritonForward:
    """A model, step by step; decode steps as graphs where there are some."""

    def __init__(self, model: Model, tuning: Tuning) -> None:
        self._model, self._tuning = model, tuning
        self.graphs: Graphs | None = None

    def __call__(self, batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> Tensor:
        """Its result lives until the next call."""
        if self.graphs is not None:
            result = self.graphs.run(batch, cosine, sine, pool)
            if result is not None:
                return result
        return self.launched(batch, cosine, sine, pool)

    def launched(self, batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> Tensor:
        """One kernel after the other."""
        result: Tensor = self._model(TritonOps(batch, cosine, sine, pool, self._tuning))
        return result

    def prepare(self, pool: Tensor, head_dim: int, rows: int) -> None:
        """Captures the graphs of steps up to `rows`, which the first ones would wait for."""
        if self.graphs is not None:
            self.graphs.prepare(pool, head_dim // 2, rows)


class TritonBackend:
    """Not for int8 weights, whose products have no kernel here: float8 is what GPUs have for it."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization = "none",
        kv_dtype: torch.dtype | None = None,
        max_blocks: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        """`kv_dtype`: of the pool, `dtype` unless given. `max_blocks`: of the longest block table
        of a decode step that is to be a graph; 0: none. `tuning`: the card's own unless given.

        ValueError: quantization that this device cannot do; the card's file of launches is broken.
        """
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError("no GPU, and Triton was imported without TRITON_INTERPRET=1")
        if quantization == "int8":
            raise ValueError("int8 weights are for CPUs; give --quantization fp8 on a GPU")
        if (quantization == "fp8" or kv_dtype == FLOAT8) and not has_float8(device):
            raise ValueError("this GPU has no float8 (compute capability 8.9 or more); give no fp8")
        self.dtype, self._device = dtype, device
        self.quantization: Quantization = quantization
        self._tuning = tuning or Tuning.of(device, dtype)
        self._max_blocks = max_blocks if device.type == "cuda" else 0

    def table(self, weight: Tensor) -> Matrix:
        return Matrix(weight)

    def pack(self, weight: Tensor | Levels, bias: Tensor | None = None) -> Matrix | Grouped:
        if isinstance(weight, Levels):
            return self._of_levels(weight, bias)
        if self.quantization == "none":
            return Matrix(weight, bias)
        outputs, inputs = weight.shape
        levels, scale = _room(outputs, inputs, weight.device)
        for first in range(0, outputs, ROWS_AT_A_TIME):
            part = slice(first, min(first + ROWS_AT_A_TIME, outputs))
            levels[part, :inputs], of_rows = fitted_float8(weight[part])
            scale[0, part] = of_rows[:, 0]
        return _float8(levels, scale, bias, outputs)

    def _of_levels(self, weight: Levels, bias: Tensor | None) -> Matrix | Grouped:
        device, is_float8 = weight.levels.device, weight.levels.dtype == FLOAT8
        if weight.rows:
            assert is_float8, "int8 rows are for CPUs"
            levels, scale = _room(weight.outputs, weight.inputs, device)
            levels.view(torch.uint8)[: weight.outputs, : weight.inputs] = weight.levels.view(
                torch.uint8
            )
            scale[0, : weight.outputs] = weight.scale.flatten()
            return _float8(levels, scale, bias, weight.outputs)
        if not is_float8 or has_float8(device):
            made = grouped(weight, bias, self._tuning.processors)
            if made is not None:
                return made
        return Matrix(weight.plain(), bias)

    pack_gated = pack

    def adapters(
        self, parts: Sequence[int], inputs: int, places: int, rank: int, gated: bool = False
    ) -> TritonAdapters:
        return TritonAdapters(parts, inputs, places, rank, self._device)

    def compile(self, model: Model) -> Forward:
        forward = TritonForward(model, self._tuning)
        if self._max_blocks:
            forward.graphs = Graphs(forward.launched, CudaCapture(), self._max_blocks)
        return forward

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        return drawing.draw(logits, draws)

    def draw_async(self, logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """The same, not waited for; see `drawing.draw_async`."""
        return drawing.draw_async(logits, draws)


def _room(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For levels of float8, zeros, and their scales `[1, out]`, ones."""
    padded = [-(-size // _ALIGNED) * _ALIGNED for size in (outputs, inputs)]
    levels = torch.zeros(*padded, dtype=FLOAT8, device=device)
    return levels, torch.ones(1, padded[0], device=device)


def _float8(levels: Tensor, scale: Tensor, bias: Tensor | None, outputs: int) -> Matrix:
    if bias is not None:
        bias = F.pad(bias, (0, len(levels) - outputs))
    return Matrix(levels, bias, scale, outputs)
