"""Every operation in plain torch, written to be read.

The specification, the oracle of the tests, and the fall-back where no faster kernel exists. Shapes
and layouts are described in `ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
    if residual is not None:
        x = residual.add_(x)
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    x.copy_(torch.cat(rotated, dim=-1))


def write_kv(key: Tensor, value: Tensor, pool: Tensor, layer: int, slots: Tensor) -> None:
    block_tokens = pool.shape[4]
    block, offset = slots // block_tokens, slots % block_tokens
    pool[block, layer, 0, :, offset] = key
    pool[block, layer, 1, :, offset] = value


def gather_kv(pool: Tensor, layer: int, block_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Key and value `[kv_heads, length, head_dim]` of one request's context."""
    blocks = pool[block_ids, layer]  # [blocks, 2, kv_heads, block_tokens, head_dim]
    key, value = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].unbind(0)
    return key, value


def paged_attention(
    query: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    scale: float,
) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    out = query.new_empty(num_tokens, num_heads, head_dim)
    group = num_heads // pool.shape[3]
    starts = query_starts.tolist()
    for row, length in enumerate(context_lengths.tolist()):
        first, end = starts[row], starts[row + 1]
        if first == end:
            continue
        num_blocks = -(-length // pool.shape[4])
        key, value = gather_kv(pool, layer, block_tables[row, :num_blocks].long(), length)
        positions = torch.arange(length - (end - first), length, device=query.device)
        visible = torch.arange(length, device=query.device) <= positions[:, None]
        attended = F.scaled_dot_product_attention(
            query[first:end].transpose(0, 1)[None],
            key.repeat_interleave(group, 0)[None],
            value.repeat_interleave(group, 0)[None],
            attn_mask=visible,
            scale=scale,
        )
        out[first:end] = attended[0].transpose(0, 1)
    return out
