"""Kinds of models that are read from GGUF: what Transformers calls their settings and tensors.

Source: llama.cpp's converter (`convert_hf_to_gguf.py`), which is undone here, and its model code
for what the metadata do not say.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.cli.model_error import ModelError

Fields = Mapping[str, Any]
Config = dict[str, Any]


class Kind(NamedTuple):
    model_type: str
    class_name: str
    features: Callable[[str, Fields, Config], Config]
    """Of the architecture's name, the metadata and what all kinds have: what this kind has."""
    layer: Mapping[str, str]
    """Tensors of a layer."""
    interleaved: bool = False
    """Are the two halves of each rotary head interleaved?"""
    norm_offset: float = 0.0
    """What the converter has added to norms."""
    experts: tuple[str, str, str] | None = None
    """Gate, up and down of expert {}, which are stored together."""


TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOUR_NORMS = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


_QWEN_MOE = {
    **_LAYER,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_QWEN_EXPERTS = (
    "mlp.experts.{}.gate_proj",
    "mlp.experts.{}.up_proj",
    "mlp.experts.{}.down_proj",
)
_MIXTRAL = {**_LAYER, "ffn_gate_inp": "block_sparse_moe.gate"}
_MIXTRAL_EXPERTS = (
    "block_sparse_moe.experts.{}.w1",
    "block_sparse_moe.experts.{}.w3",
    "block_sparse_moe.experts.{}.w2",
)


def shortest(value: float) -> float:
    """GGUF stores float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _dense(arch: str, fields: Fields, config: Config) -> Config:
    return {"hidden_act": "silu"} | _one_rope(arch, fields, config)


def _mixtral(arch: str, fields: Fields, config: Config) -> Config:
    counts = {
        "num_local_experts": int(fields[f"{arch}.expert_count"]),
        "num_experts_per_tok": int(fields[f"{arch}.expert_used_count"]),
    }
    return counts | _dense(arch, fields, config)


def _qwen_moe(arch: str, fields: Fields, config: Config) -> Config:
    """What no key says: Qwen 3's weights of a token's experts add up to 1, Qwen 2's do not."""
    shared = fields.get(f"{arch}.expert_shared_feed_forward_length")
    return {
        "num_experts": int(fields[f"{arch}.expert_count"]),
        "num_experts_per_tok": int(fields[f"{arch}.expert_used_count"]),
        "moe_intermediate_size": int(fields[f"{arch}.expert_feed_forward_length"]),
        "norm_topk_prob": arch == "qwen3moe",
        **({"shared_expert_intermediate_size": int(shared)} if shared else {}),
    } | _dense(arch, fields, config)


def _gemma(arch: str, fields: Fields, config: Config) -> Config:
    return {"hidden_act": "gelu_pytorch_tanh"} | _one_rope(arch, fields, config)


def _gemma2(arch: str, fields: Fields, config: Config) -> Config:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _scalar(config, layers_of_the_odd_one=46),
        "sliding_window": int(fields[f"{arch}.attention.sliding_window"]),
        "attn_logit_softcapping": shortest(fields[f"{arch}.attn_logit_softcapping"]),
        "final_logit_softcapping": shortest(fields[f"{arch}.final_logit_softcapping"]),
    } | _one_rope(arch, fields, config)


def _gemma3(arch: str, fields: Fields, config: Config) -> Config:
    theta = shortest(fields.get(f"{arch}.rope.freq_base", 1e6))
    local = shortest(fields.get(f"{arch}.rope.freq_base_swa", 1e4))
    scaling = rope_scaling(arch, fields, config) or {"rope_type": "default"}
    capping = fields.get(f"{arch}.final_logit_softcapping")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _scalar(config, layers_of_the_odd_one=62),
        "sliding_window": int(fields[f"{arch}.attention.sliding_window"]),
        "final_logit_softcapping": shortest(capping) if capping else None,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _scalar(config: Config, layers_of_the_odd_one: int) -> int:
    """Whose root scales scores. No key says it: the 27B model of a family has another one."""
    if config["num_hidden_layers"] == layers_of_the_odd_one:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _one_rope(arch: str, fields: Fields, config: Config) -> Config:
    scaling = rope_scaling(arch, fields, config)
    theta = shortest(fields.get(f"{arch}.rope.freq_base", 10000.0))
    return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


def rope_scaling(arch: str, fields: Fields, config: Config) -> Config | None:
    kind = fields.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"rope scaling {kind} is not read from GGUF")
    scaling = {"rope_type": kind, "factor": shortest(fields[f"{arch}.rope.scaling.factor"])}
    original = fields.get(f"{arch}.rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": int(original)} if original else {})


def llama3_scaling(table: NDArray[np.float32], theta: float, head_dim: int) -> Config:
    """Of the `rope_freqs` that stand for Llama 3's four parameters. ModelError: of no model's."""
    for factor in (8.0, 32.0):
        expected = llama3_factors(factor, theta, head_dim)
        if table.shape == expected.shape and np.allclose(table, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise ModelError("its rope_freqs fit no rope scaling that is known here")


def llama3_factors(factor: float, theta: float, head_dim: int) -> NDArray[np.float32]:
    """As the converter makes them."""
    wave = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / wave - 1.0) / 3.0
    blended = 1 / ((1 - smooth) / factor + smooth)
    result = np.where(wave < 8192 / 4, 1.0, np.where(wave > 8192, factor, blended))
    return result.astype(np.float32)


KINDS: dict[str, Kind] = {
    "llama": Kind("llama", "LlamaForCausalLM", _dense, _LAYER, interleaved=True),
    "qwen2": Kind("qwen2", "Qwen2ForCausalLM", _dense, _LAYER),
    "qwen3": Kind("qwen3", "Qwen3ForCausalLM", _dense, _LAYER),
    "mixtral": Kind(
        *("mixtral", "MixtralForCausalLM", _mixtral, _MIXTRAL),
        interleaved=True,
        experts=_MIXTRAL_EXPERTS,
    ),
    "qwen2moe": Kind(
        *("qwen2_moe", "Qwen2MoeForCausalLM", _qwen_moe, _QWEN_MOE), experts=_QWEN_EXPERTS
    ),
    "qwen3moe": Kind(
        *("qwen3_moe", "Qwen3MoeForCausalLM", _qwen_moe, _QWEN_MOE), experts=_QWEN_EXPERTS
    ),
    "gemma": Kind("gemma", "GemmaForCausalLM", _gemma, _LAYER, norm_offset=1.0),
    "gemma2": Kind("gemma2", "Gemma2ForCausalLM", _gemma2, _FOUR_NORMS, norm_offset=1.0),
    "gemma3": Kind("gemma3_text", "Gemma3ForCausalLM", _gemma3, _FOUR_NORMS, norm_offset=1.0),
}
"""By what GGUF calls their architecture; but a llama with experts is a `mixtral`."""
