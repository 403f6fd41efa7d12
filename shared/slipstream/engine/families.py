"""Model families: what an architecture means beyond the numbers in its config.json.

A family is an entry in `FAMILIES`. All share the Llama skeleton of `decoder`; they differ in
biases, in query and key norms, and in the defaults of Hugging Face's config classes.
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
    eos_token_id: int | list[int] | None = None
    quantization_config: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


class Parts(NamedTuple):
    """Which optional parts the skeleton has."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


class Family(NamedTuple):
    parts: Callable[[RawConfig], Parts]
    window: Callable[[RawConfig], bool]
    """Does some layer really attend to a sliding window?"""
    defaults: dict[str, Any]
    """Where this family's config class has other defaults than `RawConfig`."""


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
}
