"""The decoder: the Llama skeleton with the parts that its config names.

Llama, SmolLM, Mistral, Qwen2, Qwen3; Mixtral, and Qwen's with experts. Parameters are matrices as
the backend wants them and plain vectors; `weights` fills them and knows the checkpoint's names.
What a step needs comes in as arguments, nothing is kept between steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from slipstream.engine.model_config import ModelConfig
from slipstream.engine.native_adapters import LayerAdapters, NativeAdapters
from slipstream.engine.rope import Rope
from slipstream.kernels.ops import (
    Backend,
    Experts,
    Forward,
    ForwardBatch,
    Heads,
    Ops,
    Value,
    Weights,
)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: Tensor
    qkv: Weights
    """Query, key and value projections, packed: [(heads + 2 kv_heads) * head_dim, hidden]"""
    head_norms: tuple[Tensor, Tensor] | None
    """Of queries and of keys: [head_dim]"""
    output: Weights
    mlp_norm: Tensor
    gate_up: Weights
    """Gate and up projections, packed: [2 * intermediate, hidden]; None: there are experts"""
    down: Weights
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding: Weights
    """[vocab, hidden]"""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Weights


class Decoder:
    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        backend: Backend,
        reduce: Callable[[Value], Value] = lambda partial: partial,
    ) -> None:
        """`config`: of this rank's part. `reduce`: sums what the ranks have of a layer's output;
        the backend is one that computes at once, unless there is one rank."""
        self._config, self._weights, self._reduce = config, weights, reduce
        self._backend = backend
        self._rope = Rope(config.rope, config.head_dim, weights.norm.device)
        self.program = backend.compile(self._logits)
        self.adapted: Forward | None = None
        """The same with adapters, beside it: steps without are what they were."""

    def adapters(self, places: int, rank: int) -> NativeAdapters:
        """From now on batches may have adapters. Once."""
        made = NativeAdapters(self._config, self._backend, places, rank)
        self.adapted = self._backend.compile(lambda ops: self._logits(ops, made.layers))
        return made

    def forward(self, batch: ForwardBatch, pool: Tensor) -> Tensor:
        """Runs all tokens of the batch, writes their keys and values into `pool`.

        Returns the logits of the sampling rows alone: float32 `[S, vocab]`; they may be overwritten
        by the next call.
        pool: `[blocks, layers, 2, kv_heads, BLOCK_TOKENS, head_dim]` in the weights' dtype.
        """
        cosine, sine = self._rope.angles(batch.positions)
        program = self.program if batch.adapters is None else self.adapted
        assert program is not None, "who has adapters asked for `adapters` first"
        return program(batch, cosine, sine, pool)

    def _logits(self, ops: Ops, adapters: Sequence[LayerAdapters] = ()) -> Value:
        config, weights = self._config, self._weights
        epsilon = config.rms_norm_epsilon
        heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        # `stream` is the residual; `delta` is what the last sub-layer wants added to it. The next
        # norm does the addition on its way.
        stream = ops.embed(weights.embedding)
        delta: Value | None = None
        for index, layer in enumerate(weights.layers):
            own = adapters[index] if adapters else LayerAdapters()
            if delta is None:
                x = ops.rms_norm(stream, layer.attention_norm, epsilon)
            else:
                x = ops.rms_norm(delta, layer.attention_norm, epsilon, stream)
            qkv = ops.linear(x, layer.qkv, adapters=own.qkv)
            attended = ops.attention(qkv, heads, index, layer.head_norms, epsilon)
            if index == len(weights.layers) - 1:  # behind its keys and values samples alone count
                attended, stream = ops.take(attended), ops.take(stream)
            delta = self._reduce(ops.linear(attended, layer.output, adapters=own.output))
            x = ops.rms_norm(delta, layer.mlp_norm, epsilon, stream)
            if layer.experts is not None:
                delta = self._reduce(ops.moe(x, layer.experts))
            else:
                x = ops.gated(x, layer.gate_up, own.gate_up)
                delta = self._reduce(ops.linear(x, layer.down, adapters=own.down))
        x = ops.rms_norm(delta, weights.norm, epsilon, stream)
        return ops.linear(x, weights.lm_head, wide=True)
