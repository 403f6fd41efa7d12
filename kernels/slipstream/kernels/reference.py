"""Every operation in plain torch, written to be read: the specification, the oracle of the tests,
and what serves where no faster kernel exists. Shapes and layouts are described in `ops`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.draw import Draw, Drawn, draw
from slipstream.kernels.ops import (
    FLOAT8,
    VALUE_LIFT,
    Forward,
    ForwardBatch,
    Heads,
    Model,
    Quantization,
    fitted_float8,
    keys_turned,
    quantize,
    quantize_float8,
    rotation_block,
    stored,
)


@dataclass(frozen=True, slots=True)
class Matrix:
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    """Of quantized weights: `[out]`."""

    def times(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        levels, scale = (quantize if self.weight.dtype == torch.int8 else quantize_float8)(x)
        out = F.linear(levels.float(), self.weight.float()) * scale * self.scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class Reference:
    """A backend that computes at once."""

    def __init__(self, quantization: Quantization = "none") -> None:
        self.quantization = quantization

    def table(self, weight: Tensor) -> Matrix:
        return Matrix(weight)

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Matrix:
        if self.quantization == "none":
            return Matrix(weight, bias)
        if self.quantization == "fp8":
            levels, scale = fitted_float8(weight)
            return Matrix(levels, bias, scale.flatten())
        levels, scale = quantize(weight)
        return Matrix(levels, bias, scale.flatten() / rotation_block(weight.shape[1]))

    pack_gated = pack

    def compile(self, model: Model) -> Forward:
        def forward(batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> Tensor:
            result: Tensor = model(ReferenceOps(batch, cosine, sine, pool))
            return result

        return forward

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        return draw(logits, draws)


class ReferenceOps:
    def __init__(self, batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> None:
        self._batch, self._pool = batch, pool
        self._cosine, self._sine = cosine.unsqueeze(1), sine.unsqueeze(1)

    def embed(self, table: Matrix) -> Tensor:
        return F.embedding(self._batch.tokens, table.weight)

    def take(self, x: Tensor) -> Tensor:
        return x[self._batch.sample_indices]

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        if residual is not None:
            x = residual.add_(x)
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return weight * (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)

    def linear(self, x: Tensor, weights: Matrix, wide: bool = False) -> Tensor:
        out = weights.times(x)
        return out.float() if wide else out

    def gated(self, x: Tensor, weights: Matrix) -> Tensor:
        gate, up = weights.times(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    def attention(
        self,
        qkv: Tensor,
        heads: Heads,
        layer: int,
        norms: tuple[Tensor, Tensor] | None,
        epsilon: float,
    ) -> Tensor:
        sizes = [heads.query, heads.kv, heads.kv]
        rows = qkv.view(len(qkv), sum(sizes), heads.dim)
        query, key, value = torch.split(rows, sizes, dim=1)
        if norms is not None:
            query = self.rms_norm(query, norms[0], epsilon)
            key = self.rms_norm(key, norms[1], epsilon)
        query, key = self._rotated(query), self._rotated(key)
        if self._pool.dtype == FLOAT8:
            query, key = keys_turned(query.float()).to(qkv.dtype), keys_turned(key.float())
            value = value.float() * VALUE_LIFT
        self._write(key, value, layer)
        return self._attend(query, layer).flatten(1)

    def _write(self, key: Tensor, value: Tensor, layer: int) -> None:
        real = self._batch.slots >= 0
        slots, pool = self._batch.slots[real], _bits(self._pool)
        block, offset = slots // pool.shape[4], slots % pool.shape[4]
        for kind, rows in enumerate((key, value)):
            pool[block, layer, kind, :, offset] = _bits(stored(rows[real], self._pool.dtype))

    def _rotated(self, x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        rotated = (
            first * self._cosine - second * self._sine,
            second * self._cosine + first * self._sine,
        )
        return torch.cat(rotated, dim=-1).to(x.dtype)

    def _attend(self, query: Tensor, layer: int) -> Tensor:
        batch, pool = self._batch, self._pool
        out = torch.empty_like(query)
        group = query.shape[1] // pool.shape[3]
        starts = batch.query_starts.tolist()
        for row, length in enumerate(batch.context_lengths.tolist()):
            first, end = starts[row], starts[row + 1]
            if not length:  # padding
                out[first:end] = 0
                continue
            num_blocks = -(-length // pool.shape[4])
            key, value = _gather(pool, layer, batch.block_tables[row, :num_blocks].long(), length)
            positions = torch.arange(length - (end - first), length, device=query.device)
            visible = torch.arange(length, device=query.device) <= positions[:, None]
            attended = F.scaled_dot_product_attention(
                query[first:end].transpose(0, 1)[None],
                key.repeat_interleave(group, 0)[None].to(query.dtype),
                value.repeat_interleave(group, 0)[None].to(query.dtype),
                attn_mask=visible,
            )
            out[first:end] = attended[0].transpose(0, 1)
        return out / VALUE_LIFT if pool.dtype == FLOAT8 else out


def _bits(x: Tensor) -> Tensor:
    """float8 as its bits, which can be indexed everywhere."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x


def _gather(pool: Tensor, layer: int, block_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Key and value `[kv_heads, length, head_dim]` of one request's context."""
    blocks = _bits(pool)[block_ids, layer].view(
        pool.dtype
    )  # [blocks, 2, kv_heads, block_tokens, head_dim]
    key, value = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].unbind(0)
    return key, value
