"""The operations that model code is made of, apart from matrix products.

`OPS` names them all. Each has a reference in plain torch, which specifies it; on a CPU a compiled
kernel takes over where there is one (see `cpu`). Tensors are float32 or bfloat16 throughout; sums
are float32. The token dimension may be strided, everything behind it is contiguous: the packed
output of the query-key-value projection is used in place.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from slipstream.kernels import cpu, reference


class Kernels(Protocol):
    """One implementation of all operations; `reference` is another."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor: ...
    def silu_and_mul(self, x: Tensor) -> Tensor: ...
    def rotary(self, x: Tensor, cosine: Tensor, sine: Tensor) -> None: ...
    def write_kv(
        self, key: Tensor, value: Tensor, pool: Tensor, layer: int, slots: Tensor
    ) -> None: ...
    def paged_attention(
        self,
        query: Tensor,
        pool: Tensor,
        layer: int,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lengths: Tensor,
        scale: float,
    ) -> Tensor: ...


def _kernels(x: Tensor) -> Kernels:
    if x.is_cuda:
        return reference
    return cpu.kernels() or reference


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension, as a new contiguous tensor.

    x: `[tokens, dim]` or `[tokens, heads, dim]`; weight: `[dim]`. With `residual` (shaped like x,
    contiguous) x is added to it in place first and the sum is normalised. The mean is float32; the
    result is rounded to x's dtype before the weight is applied, as in Llama.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    return _kernels(x).rms_norm(x, weight, epsilon, residual)


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` of packed `[gate | up]`: `[tokens, 2 * dim]` -> `[tokens, dim]`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    return _kernels(x).silu_and_mul(x)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Rotates `x [tokens, heads, head_dim]` in place by each token's angles.

    cosine, sine: float32 `[tokens, head_dim / 2]`. Dimension i pairs with i + head_dim / 2 (the
    layout of Hugging Face checkpoints); computed in float32 and rounded once.
    Source: Su et al., "RoFormer", 2021.
    """
    _kernels(x).rotary(x, cosine, sine)


def write_kv(key: Tensor, value: Tensor, pool: Tensor, layer: int, slots: Tensor) -> None:
    """Puts keys and values of new tokens into their slots of the pool.

    key, value: `[tokens, kv_heads, head_dim]`; pool: `[blocks, layers, 2, kv_heads, block_tokens,
    head_dim]`, same dtype; slots: int64 `[tokens]`, block id * block_tokens + offset.
    """
    _kernels(key).write_kv(key, value, pool, layer, slots)


def paged_attention(
    query: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of a mixed batch over KV blocks, read where they lie.

    query: `[tokens, heads, head_dim]`, the rows of the batch one after another; pool: as in
    `write_kv`, with the keys and values of these tokens in it; block_tables: int32
    `[rows, blocks]`; query_starts: int32 `[rows + 1]`; context_lengths: int32 `[rows]`, with the
    new tokens. A row's queries are the last ones of its context. Query head h reads KV head
    h // (heads / kv_heads).
    Returns `[tokens, heads, head_dim]`. A query's result depends on nothing but itself and the keys
    and values before it, not on chunking, nor on other rows (the compiled kernel bit by bit, the
    reference up to rounding). Slots beyond a context may hold anything, NaN too.
    Source: Kwon et al., "PagedAttention", 2023; online softmax: Dao et al., "FlashAttention", 2022.
    """
    return _kernels(query).paged_attention(
        query, pool, layer, block_tables, query_starts, context_lengths, scale
    )


OPS: dict[str, Callable[..., Tensor | None]] = {
    "rms_norm": rms_norm,
    "silu_and_mul": silu_and_mul,
    "rotary": rotary,
    "write_kv": write_kv,
    "paged_attention": paged_attention,
}
