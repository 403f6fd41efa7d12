"""Turns a GGUF file into a Hugging Face folder: bfloat16 safetensors, config, tokenizer.

Only the Llama skeleton (llama, qwen2, qwen3), because only there is every tensor's place known; a
file with anything else is refused by name rather than read wrongly.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from slipstream.cli.gguf_tokenizer import build_tokenizer, tokenizer_config
from slipstream.cli.model_error import ModelError

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""

SHARD_BYTES = 2**30
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP = {
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


def convert_gguf(source: Path, target: Path, progress: Progress) -> None:
    """Fills the empty folder `target`. ModelError: why `source` cannot be turned into one."""
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(f"{source}: not a readable GGUF file: {error}") from None
    try:
        _convert(reader, target, progress)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    except KeyError as error:
        raise ModelError(f"{source}: the GGUF metadata lack {error}") from None


def _convert(reader: Any, target: Path, progress: Progress) -> None:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields, {tensor.name: tensor for tensor in reader.tensors})
    tokenizer = build_tokenizer(fields)
    _write_weights(_tensors(reader, config, progress), target)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", generation_config(fields))
    context_length = config["max_position_embeddings"]
    _write_json(target / "tokenizer_config.json", tokenizer_config(fields, context_length))
    tokenizer.save(str(target / "tokenizer.json"))


def model_config(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """`config.json` from the metadata of the file and the names of its tensors."""
    arch = str(fields["general.architecture"])
    if arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"architecture {arch} is not read from GGUF (known: {known})")
    model_type, class_name = _ARCHITECTURES[arch]
    heads = int(fields[f"{arch}.attention.head_count"])
    hidden = int(fields[f"{arch}.embedding_length"])
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(fields[f"{arch}.feed_forward_length"]),
        "num_hidden_layers": int(fields[f"{arch}.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get(f"{arch}.attention.head_count_kv", heads)),
        "head_dim": int(fields.get(f"{arch}.attention.key_length", hidden // heads)),
        "max_position_embeddings": int(fields[f"{arch}.context_length"]),
        "rms_norm_eps": _shortest(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields.get(f"{arch}.rope.freq_base", 10000.0)),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if scaling := _rope_scaling(fields, tensors, arch, config):
        config["rope_scaling"] = scaling
    return config | _token_ids(fields)


def generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, and the sampling that SmolLM2's model card recommends.

    A small model at temperature 1 rambles; a request that names its own values is not affected.
    """
    ids = _token_ids(fields)
    eot = fields.get("tokenizer.ggml.eot_token_id")
    if eot is not None and eot != ids.get("eos_token_id"):
        ids["eos_token_id"] = [ids["eos_token_id"], int(eot)]
    return ids | {"do_sample": True, "temperature": 0.2, "top_p": 0.9}


def _token_ids(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": int(fields[f"tokenizer.ggml.{key}_token_id"])
        for name, key in names.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }


def _shortest(value: float) -> float:
    """GGUF stores float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(
    fields: dict[str, Any], tensors: dict[str, Any], arch: str, config: dict[str, Any]
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:
        found = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        for factor in (8.0, 32.0):
            expected = _llama3_factors(factor, config["rope_theta"], config["head_dim"])
            if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-3):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
        raise ModelError("its rope_freqs fit no rope scaling that is known here")
    kind = fields.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"rope scaling {kind} is not read from GGUF")
    scaling = {"rope_type": kind, "factor": _shortest(fields[f"{arch}.rope.scaling.factor"])}
    original = fields.get(f"{arch}.rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": int(original)} if original else {})


def _llama3_factors(factor: float, theta: float, head_dim: int) -> NDArray[np.float32]:
    """Source: llama.cpp's converter, which stores this instead of Llama 3's four parameters."""
    wave = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / wave - 1.0) / 3.0
    blended = 1 / ((1 - smooth) / factor + smooth)
    result = np.where(wave < 8192 / 4, 1.0, np.where(wave > 8192, factor, blended))
    return result.astype(np.float32)


def _tensors(
    reader: Any, config: dict[str, Any], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for done, tensor in enumerate(reader.tensors):
        progress(done, len(reader.tensors))
        if tensor.name == "rope_freqs.weight":
            continue
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        permuted = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
        if permuted and config["model_type"] == "llama":
            weights = _unpermute(weights, heads[permuted[1]])
        yield hf_name(tensor.name), torch.from_numpy(weights).to(torch.bfloat16)
    progress(len(reader.tensors), len(reader.tensors))


def hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if parts is None or parts[2] not in _LAYER:
        raise ModelError(f"tensor {name} has no place in a Llama-like decoder")
    return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"


def _unpermute(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp interleaves the two halves of each rotary head; Transformers keeps them apart."""
    half = weights.shape[0] // heads // 2
    split = weights.reshape(heads, half, 2, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(2, 1).reshape(weights.shape))


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], target: Path) -> None:
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0
    for name, values in tensors:
        if shard and size + values.nbytes > SHARD_BYTES:
            shards.append(_write_shard(shard, target, len(shards)))
            shard, size = {}, 0
        shard[name] = values
        size += values.nbytes
        total += values.nbytes
    shards.append(_write_shard(shard, target, len(shards)))
    if len(shards) == 1:
        (target / "shard-0").rename(target / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (target / f"shard-{index}").rename(target / final)
        weight_map |= dict.fromkeys(names, final)
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(target / "model.safetensors.index.json", index_file)


def _write_shard(shard: dict[str, torch.Tensor], target: Path, index: int) -> list[str]:
    save_file(shard, target / f"shard-{index}", {"format": "pt"})
    return list(shard)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
