"""Turns a GGUF file into a Hugging Face folder: bfloat16 safetensors, config, tokenizer.

Only kinds of models that `gguf_kinds` lists, because only there is every tensor's place known; a
file with anything else is refused by name rather than read wrongly.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from slipstream.cli.gguf_kinds import KINDS, TOP, Kind, llama3_scaling, shortest
from slipstream.cli.gguf_tokenizer import build_tokenizer, tokenizer_config
from slipstream.cli.model_error import ModelError

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""

SHARD_BYTES = 2**30
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""What a file may recommend (`general.sampling.*`) -> its name in generation_config.json."""


def convert_gguf(
    source: Path, target: Path, progress: Progress, recommended: Mapping[str, float]
) -> None:
    """Fills the empty folder `target`. `recommended`: its makers' sampling, as far as the file has
    none of its own. ModelError: why `source` cannot be turned into a folder."""
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(f"{source}: not a readable GGUF file: {error}") from None
    try:
        _convert(reader, target, progress, recommended)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    except KeyError as error:
        raise ModelError(f"{source}: the GGUF metadata lack {error}") from None


def _convert(
    reader: Any, target: Path, progress: Progress, recommended: Mapping[str, float]
) -> None:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields, {tensor.name: tensor for tensor in reader.tensors})
    tokenizer = build_tokenizer(fields)
    kind = _kind(fields)
    _write_weights(_tensors(reader, kind, config, progress), target)
    _write_json(target / "config.json", config)
    generation = {**recommended, **generation_config(fields)}
    _write_json(target / "generation_config.json", generation)
    context_length = config["max_position_embeddings"]
    _write_json(target / "tokenizer_config.json", tokenizer_config(fields, context_length))
    tokenizer.save(str(target / "tokenizer.json"))


def model_config(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """`config.json` from the metadata of the file and the names of its tensors."""
    arch, kind = str(fields["general.architecture"]), _kind(fields)
    heads = int(fields[f"{arch}.attention.head_count"])
    hidden = int(fields[f"{arch}.embedding_length"])
    config: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": int(fields[f"{arch}.feed_forward_length"]),
        "num_hidden_layers": int(fields[f"{arch}.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get(f"{arch}.attention.head_count_kv", heads)),
        "head_dim": int(fields.get(f"{arch}.attention.key_length", hidden // heads)),
        "max_position_embeddings": int(fields[f"{arch}.context_length"]),
        "rms_norm_eps": shortest(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    config |= kind.features(arch, fields, config)
    if kind.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if "rope_freqs.weight" in tensors:
        table = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        config["rope_scaling"] = llama3_scaling(table, config["rope_theta"], config["head_dim"])
    return config | _token_ids(fields)


def _kind(fields: dict[str, Any]) -> Kind:
    arch = str(fields["general.architecture"])
    if arch == "llama" and fields.get("llama.expert_count"):
        return KINDS["mixtral"]
    if arch not in KINDS:
        known = ", ".join(KINDS)
        raise ModelError(f"architecture {arch} is not read from GGUF (known: {known})")
    return KINDS[arch]


def generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, and the sampling that the file recommends."""
    ids = _token_ids(fields)
    eot = fields.get("tokenizer.ggml.eot_token_id")
    if eot is not None and eot != ids.get("eos_token_id"):
        ids["eos_token_id"] = [ids["eos_token_id"], int(eot)]
    said = {ours: fields.get(f"general.sampling.{name}") for name, ours in SAMPLING.items()}
    return (
        {"do_sample": True}
        | ids
        | {
            name: round(value) if name == "top_k" else shortest(value)
            for name, value in said.items()
            if value is not None
        }
    )


def _token_ids(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": int(fields[f"tokenizer.ggml.{key}_token_id"])
        for name, key in names.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }


def _tensors(
    reader: Any, kind: Kind, config: dict[str, Any], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for done, tensor in enumerate(reader.tensors):
        progress(done, len(reader.tensors))
        if tensor.name == "rope_freqs.weight":
            continue
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        rotated = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
        if rotated and kind.interleaved:
            weights = _unpermute(weights, heads[rotated[1]])
        if tensor.name.endswith("norm.weight"):
            weights = weights - np.float32(kind.norm_offset)
        for name, part in _apart(tensor.name, weights, kind):
            yield name, torch.from_numpy(part).to(torch.bfloat16)
    progress(len(reader.tensors), len(reader.tensors))


def _apart(
    name: str, weights: NDArray[np.float32], kind: Kind
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A layer's experts lie in one tensor."""
    together = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", name)
    if together is None or kind.experts is None:
        row = name.endswith("ffn_gate_inp_shexp.weight")  # a matrix of one row
        yield hf_name(name, kind), weights.reshape(1, -1) if row else weights
        return
    named = kind.experts[("gate", "up", "down").index(together[2])]
    for number, expert in enumerate(weights):
        yield f"model.layers.{together[1]}.{named.format(number)}.weight", expert


def hf_name(name: str, kind: Kind) -> str:
    if name in TOP:
        return TOP[name]
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if parts is None or parts[2] not in kind.layer:
        raise ModelError(f"tensor {name} has no place in a {kind.class_name}")
    return f"model.layers.{parts[1]}.{kind.layer[parts[2]]}.{parts[3]}"


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
