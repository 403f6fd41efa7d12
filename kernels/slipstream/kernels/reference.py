"""Every operation in plain torch, written to be read: the specification, the oracle of the tests,
and what serves where no faster kernel exists. Shapes and layouts are described in `ops`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.draw import Draw, Drawn, as_tensors, draw
from slipstream.kernels.levels import Levels
from slipstream.kernels.ops import (
    FLOAT8,
    NO_ADAPTER,
    VALUE_LIFT,
    Experts,
    Forward,
    ForwardBatch,
    Heads,
    LowRank,
    Model,
    Quantization,
    Scoring,
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
    turned: bool = True
    """Of int8 weights: they are rotated."""

    def times(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        if self.weight.dtype == torch.int8:
            levels, scale = quantize(x, self.turned)
        else:
            levels, scale = quantize_float8(x)
        out = F.linear(levels.float(), self.weight.float()) * scale * self.scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class ReferenceAdapters:
    def __init__(self, parts: Sequence[int], places: int) -> None:
        self._parts = list(parts)
        self._places: list[LowRank | None] = [None] * places

    def pack(self, low: LowRank) -> LowRank:
        return low

    def put(self, place: int, packed: LowRank | None) -> None:
        self._places[place] = packed

    def add(self, out: Tensor, x: Tensor, places: Tensor) -> Tensor:
        """To `out`, in place, what the adapters of its rows make of `x`."""
        for place in set(places.tolist()):
            low = None if place == NO_ADAPTER else self._places[place]
            if low is None:
                continue
            rows = (places == place).nonzero()[:, 0]
            inner = F.linear(x[rows].float(), low.down.float())
            inner = inner.view(len(rows), len(self._parts), -1) * low.scale[:, None]
            ups = low.up.float().split(self._parts)
            made = [F.linear(inner[:, part], up) for part, up in enumerate(ups)]
            out[rows] = (out[rows].float() + torch.cat(made, dim=1)).to(out.dtype)
        return out


class Reference:
    """A backend that computes at once."""

    def __init__(self, quantization: Quantization = "none") -> None:
        self.quantization = quantization

    def table(self, weight: Tensor) -> Matrix:
        return Matrix(weight)

    def pack(self, weight: Tensor | Levels, bias: Tensor | None = None) -> Matrix:
        if isinstance(weight, Levels):
            if weight.rows:
                return Matrix(weight.levels, bias, weight.scale.float().flatten(), turned=False)
            return Matrix(weight.plain(), bias)
        if self.quantization == "none":
            return Matrix(weight, bias)
        if self.quantization == "fp8":
            levels, scale = fitted_float8(weight)
            return Matrix(levels, bias, scale.flatten())
        levels, scale = quantize(weight)
        return Matrix(levels, bias, scale.flatten() / rotation_block(weight.shape[1]))

    pack_gated = pack

    def adapters(
        self, parts: Sequence[int], inputs: int, places: int, rank: int, gated: bool = False
    ) -> ReferenceAdapters:
        return ReferenceAdapters(parts, places)

    def compile(self, model: Model) -> Forward:
        def forward(batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> Tensor:
            result: Tensor = model(ReferenceOps(batch, cosine, sine, pool))
            return result

        return forward

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        return draw(logits, draws)

    def draw_async(self, logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        return as_tensors(draw(logits, draws), logits.device)


class ReferenceOps:
    def __init__(self, batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> None:
        self._batch, self._pool = batch, pool
        self._cosine, self._sine = cosine.unsqueeze(1), sine.unsqueeze(1)
        self._places = batch.adapters

    def embed(self, table: Matrix) -> Tensor:
        return F.embedding(self._batch.tokens, table.weight)

    def take(self, x: Tensor) -> Tensor:
        if self._batch.adapters is not None:
            self._places = self._batch.adapters[self._batch.sample_indices]
        return x[self._batch.sample_indices]

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        if residual is not None:
            x = residual.add_(x)
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return weight * (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)

    def linear(
        self,
        x: Tensor,
        weights: Matrix,
        wide: bool = False,
        adapters: ReferenceAdapters | None = None,
    ) -> Tensor:
        out = self._adapted(weights.times(x), x, adapters)
        return out.float() if wide else out

    def gated(
        self, x: Tensor, weights: Matrix, adapters: ReferenceAdapters | None = None
    ) -> Tensor:
        gate, up = self._adapted(weights.times(x), x, adapters).chunk(2, dim=-1)
        return F.silu(gate) * up

    def _adapted(self, out: Tensor, x: Tensor, adapters: ReferenceAdapters | None) -> Tensor:
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
        sizes = [heads.query, heads.kv, heads.kv]
        rows = qkv.view(len(qkv), sum(sizes), heads.dim)
        query, key, value = torch.split(rows, sizes, dim=1)
        if norms is not None:
            query = self.rms_norm(query, norms[0], epsilon)
            key = self.rms_norm(key, norms[1], epsilon)
        query, key = self._rotated(query), self._rotated(key)
        scoring = Scoring(heads.dim**-0.5)
        return attend(self._batch, query, key, value, self._pool, layer, scoring).flatten(1)

    def _rotated(self, x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        rotated = (
            first * self._cosine - second * self._sine,
            second * self._cosine + first * self._sine,
        )
        return torch.cat(rotated, dim=-1).to(x.dtype)


def moe(x: Tensor, experts: Experts) -> Tensor:
    """As `Ops.moe`. Pairs of token and expert are sorted by expert, those of other processes last:
    one product over all experts, each with the rows that are its own. Nothing waits for a number
    from the device."""
    scores = F.linear(x, experts.router).float().softmax(-1)
    weights, chosen = scores.topk(experts.top_k, dim=-1)
    if experts.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    count = len(experts.down)
    own = chosen.flatten() - experts.first
    own = own.where((own >= 0) & (own < count), count)
    numbers, order = own.sort(stable=True)
    ends = torch.searchsorted(numbers, torch.arange(count, device=x.device), right=True).int()
    rows = x[order // experts.top_k]
    gate, up = F.grouped_mm(rows, experts.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    made = F.grouped_mm(F.silu(gate) * up, experts.down.transpose(1, 2), offs=ends)
    weighed = (made * weights.flatten()[order, None]).masked_fill((numbers == count)[:, None], 0)
    said = torch.empty_like(weighed)
    said[order] = weighed
    out = said.view(*chosen.shape, x.shape[1]).sum(1)
    if (shared := experts.shared) is not None:
        gate, up = F.linear(x, shared.gate_up).chunk(2, dim=-1)
        out = out + F.linear(x, shared.gate).sigmoid() * F.linear(F.silu(gate) * up, shared.down)
    return out.to(x.dtype)


def attend(
    batch: ForwardBatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Tensor,
    layer: int,
    scoring: Scoring,
) -> Tensor:
    """Writes keys and values, `[T, kv_heads, head_dim]`, to the batch's slots; then each query,
    `[T, heads, head_dim]`, attends to its request's context up to itself. See `Ops.attention`.
    Blocks that no query of a row sees are not read."""
    if pool.dtype == FLOAT8:
        query, key = keys_turned(query.float()).to(query.dtype), keys_turned(key.float())
        value = value.float() * VALUE_LIFT
    _write(batch, key, value, pool, layer)
    out = torch.empty_like(query)
    starts, block_tokens = batch.query_starts.tolist(), pool.shape[4]
    for row, length in enumerate(batch.context_lengths.tolist()):
        first, end = starts[row], starts[row + 1]
        if not length:  # padding
            out[first:end] = 0
            continue
        seen = _first_seen(length - (end - first), scoring) // block_tokens
        table = batch.block_tables[row, seen : -(-length // block_tokens)].long()
        seen *= block_tokens
        keys, values = _gather(pool, layer, table, length - seen)
        position = torch.arange(length - (end - first), length, device=query.device)[:, None]
        other = torch.arange(seen, length, device=query.device)
        visible = other <= position
        if scoring.window:
            visible &= other > position - scoring.window
        if scoring.chunk:
            visible &= other // scoring.chunk == position // scoring.chunk
        out[first:end] = _weighed(
            query[first:end].transpose(0, 1),
            keys.to(query.dtype),
            values.to(query.dtype),
            visible,
            scoring,
        ).transpose(0, 1)
    return out / VALUE_LIFT if pool.dtype == FLOAT8 else out


def _first_seen(position: int, scoring: Scoring) -> int:
    """The first position that a query at `position` sees."""
    first = max(0, position - scoring.window + 1) if scoring.window else 0
    return max(first, position - position % scoring.chunk) if scoring.chunk else first


def _weighed(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scoring: Scoring
) -> Tensor:
    """Of one row: `[heads, queries, head_dim]`."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    if not scoring.softcap and scoring.sinks is None:
        attended = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=visible, scale=scoring.scale
        )
        return attended[0]
    scores = (query @ key.transpose(1, 2)).float() * scoring.scale
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[1]]
    return weights.to(query.dtype) @ value


def _write(batch: ForwardBatch, key: Tensor, value: Tensor, pool: Tensor, layer: int) -> None:
    real = batch.slots >= 0
    slots, bits = batch.slots[real], _bits(pool)
    block, offset = slots // pool.shape[4], slots % pool.shape[4]
    for kind, rows in enumerate((key, value)):
        bits[block, layer, kind, :, offset] = _bits(stored(rows[real], pool.dtype))


def _bits(x: Tensor) -> Tensor:
    """float8 as its bits, which can be indexed everywhere."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x


def _gather(pool: Tensor, layer: int, block_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Key and value `[kv_heads, length, head_dim]` of one request's context."""
    # [blocks, 2, kv_heads, block_tokens, head_dim]
    blocks = _bits(pool)[block_ids, layer].view(pool.dtype)
    key, value = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].unbind(0)
    return key, value
