"""The dense decoder: the Llama skeleton with the parts that its config names.

Llama, SmolLM, Mistral, Qwen2, Qwen3. Parameters are plain tensors in dataclasses; `weights` fills
them and knows the checkpoint's names. What a step needs comes in as arguments, nothing is kept
between steps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.engine.batch import ForwardBatch
from slipstream.engine.linear import Linear
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.rope import Rope
from slipstream.kernels import ops


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: Tensor
    qkv: Linear
    """Query, key and value projections, packed: [(heads + 2 kv_heads) * head_dim, hidden]"""
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    """Gate and up projections, packed: [2 * intermediate, hidden]"""
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding: Tensor
    """[vocab, hidden]"""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear


class Decoder:
    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.rope = Rope(config.rope, config.head_dim, weights.embedding.device)

    def forward(self, batch: ForwardBatch, pool: Tensor) -> Tensor:
        """Runs all tokens of the batch, writes their keys and values into `pool`.

        Returns the logits of the sampling rows alone: float32 `[S, vocab]`.
        pool: `[blocks, layers, 2, kv_heads, BLOCK_TOKENS, head_dim]` in the weights' dtype.
        """
        epsilon = self.config.rms_norm_epsilon
        cosine, sine = self.rope.angles(batch.positions)
        # `residual` is the stream; `delta` is what the last sub-layer wants added to it. The next
        # norm does the addition on its way.
        residual = F.embedding(batch.tokens, self.weights.embedding)
        delta: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            if delta is None:
                x = ops.rms_norm(residual, layer.attention_norm, epsilon)
            else:
                x = ops.rms_norm(delta, layer.attention_norm, epsilon, residual)
            delta = self._attention(layer, index, x, cosine, sine, batch, pool)
            x = ops.rms_norm(delta, layer.mlp_norm, epsilon, residual)
            delta = layer.down(ops.silu_and_mul(layer.gate_up(x)))
        assert delta is not None
        last = batch.sample_indices
        if last.shape[0] == 0:
            return residual.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        x = ops.rms_norm(delta[last], self.weights.norm, epsilon, residual[last])
        return self.weights.lm_head(x).float()

    def _attention(
        self,
        layer: LayerWeights,
        index: int,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        batch: ForwardBatch,
        pool: Tensor,
    ) -> Tensor:
        config = self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, head_dim)
        query, key = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
        value = qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            query = ops.rms_norm(query, layer.q_norm, config.rms_norm_epsilon)
            key = ops.rms_norm(key, layer.k_norm, config.rms_norm_epsilon)
            ops.rotary(query, cosine, sine)
            ops.rotary(key, cosine, sine)
        else:  # both still lie side by side
            ops.rotary(qkv[:, : heads + kv_heads], cosine, sine)
        ops.write_kv(key, value, pool, index, batch.slots)
        attended = ops.paged_attention(
            query,
            pool,
            index,
            batch.block_tables,
            batch.query_starts,
            batch.context_lengths,
            head_dim**-0.5,
        )
        return layer.output(attended.view(-1, heads * head_dim))
