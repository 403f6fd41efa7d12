"""Model families: what an architecture means beyond the numbers in its config.json.

A family is an entry in `FAMILIES`. All share the Llama skeleton of `decoder`; they differ in
biases, in query and key norms, in experts, and in the defaults of Hugging Face's config classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from msgspec import Struct


class RawConfig(Struct, kw_only=True):
    """config.json as far as we read it; one architecture's meaning is in its `Family`."""

    architectures: list[str] = []
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    qkv_bias: bool = True
    eos_token_id: int | list[int] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


class Parts(NamedTuple):
    """Which optional parts the skeleton has."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


class ExpertsConfig(Struct, frozen=True, kw_only=True):
    """Of the layers whose MLP is one of experts."""

    layers: frozenset[int]
    count: int
    top_k: int
    intermediate_size: int
    normalized: bool
    shared_intermediate_size: int = 0
    """Of the expert of all tokens; 0: there is none."""
    module: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What the checkpoint calls the layer's MLP, and an expert's matrices."""


class Family(NamedTuple):
    parts: Callable[[RawConfig], Parts]
    window: Callable[[RawConfig], bool]
    """Does some layer really attend to a sliding window?"""
    defaults: dict[str, Any]
    """Where this family's config class has other defaults than `RawConfig`."""
    experts: Callable[[RawConfig], ExpertsConfig] | None = None


def _window_never(raw: RawConfig) -> bool:
    return False


def _window_by_size(raw: RawConfig) -> bool:
    return raw.sliding_window is not None and raw.sliding_window < raw.max_position_embeddings


def _window_by_layer(raw: RawConfig) -> bool:
    layers = raw.layer_types
    if layers is not None:
        windowed = "sliding_attention" in layers
    else:
        windowed = raw.max_window_layers < raw.num_hidden_layers
    return raw.use_sliding_window and windowed and _window_by_size(raw)


def _mixtral_experts(raw: RawConfig) -> ExpertsConfig:
    return ExpertsConfig(
        layers=frozenset(range(raw.num_hidden_layers)),
        count=raw.num_local_experts or 0,
        top_k=raw.num_experts_per_tok,
        intermediate_size=raw.intermediate_size,
        normalized=True,
        module="block_sparse_moe",
        names=("w1", "w3", "w2"),
    )


def _qwen_experts(raw: RawConfig) -> ExpertsConfig:
    dense = raw.mlp_only_layers or ()
    step = max(raw.decoder_sparse_step, 1)
    sparse = (i for i in range(raw.num_hidden_layers) if i not in dense and (i + 1) % step == 0)
    return ExpertsConfig(
        layers=frozenset(sparse),
        count=raw.num_experts or raw.num_local_experts or 0,
        top_k=raw.num_experts_per_tok,
        intermediate_size=raw.moe_intermediate_size or 0,
        normalized=raw.norm_topk_prob,
        shared_intermediate_size=raw.shared_expert_intermediate_size,
    )


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        parts=lambda raw: Parts(raw.attention_bias, raw.attention_bias, raw.mlp_bias, False),
        window=_window_never,
        defaults={},
    ),
    "MistralForCausalLM": Family(
        parts=lambda raw: Parts(False, False, False, False),
        window=_window_by_size,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        parts=lambda raw: Parts(True, False, False, False),
        window=_window_by_layer,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Family(
        parts=lambda raw: Parts(raw.attention_bias, raw.attention_bias, False, True),
        window=_window_by_layer,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "MixtralForCausalLM": Family(
        parts=lambda raw: Parts(False, False, False, False),
        window=_window_by_size,
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-5},
        experts=_mixtral_experts,
    ),
    "Qwen2MoeForCausalLM": Family(
        parts=lambda raw: Parts(raw.qkv_bias, False, False, False),
        window=_window_by_layer,
        defaults={
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        experts=_qwen_experts,
    ),
    "Qwen3MoeForCausalLM": Family(
        parts=lambda raw: Parts(raw.attention_bias, raw.attention_bias, False, True),
        window=lambda raw: raw.use_sliding_window and _window_by_size(raw),
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        experts=_qwen_experts,
    ),
}
