"""GGUF files of every kind that is read, written as llama.cpp's converter would: what is made of
them computes what the model computed, and splits text as Transformers does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from slipstream.cli.gguf_kinds import KINDS
from slipstream.cli.models import prepare
from slipstream.engine.model_config import ForeignModel, ModelConfig
from slipstream.engine.models import read_model
from slipstream.tokenizer.recommended import recommended_sampling

Type = gguf.GGMLQuantizationType
WRITABLE = [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
_SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,  # Gemma 3: six of them, and one more
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW, _CAPS = 24, (50.0, 30.0)
_GEMMA2 = {
    "sliding_window": _WINDOW,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": _CAPS[0],
    "final_logit_softcapping": _CAPS[1],
}
_GEMMA3 = {"sliding_window": _WINDOW, "query_pre_attn_scalar": 32}
MOE = ("mixtral", "qwen2moe", "qwen3moe")
_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "llama": {"tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 5, "head_dim": 16},
    "qwen2moe": {**_MOE, "shared_expert_intermediate_size": 64, "head_dim": 16},
    "qwen3moe": {**_MOE, "norm_topk_prob": True},
}
PIECES = ["▁", "▁▁", "a", "b", "c", "d", "e", "ab", "▁a", "▁ab", "abc", "cd", "▁abc", "de", "▁de"]


def original(arch: str) -> Any:
    """A random model of this kind."""
    kind = KINDS[arch]
    config = CONFIG_MAPPING[kind.model_type](**{**_SIZES, **_SPECIAL.get(arch, {})})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(*((0.0, 0.2) if "norm" in name else (0.0, 0.15)))
    return model


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of the converter."""
    rows = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return rows.swapaxes(1, 2).reshape(weights.shape)


def write(
    file: Path, arch: str, model: Any, kind: Type, say: Callable[[Any], None] = lambda writer: None
) -> None:
    """The model as a file; its parameters become what a reader will make of that."""
    kind_name, arch = arch, "llama" if arch == "mixtral" else arch
    writer = gguf.GGUFWriter(file, arch)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(_WINDOW)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(_CAPS[0])
        writer.add_final_logit_softcapping(_CAPS[1])
    if kind_name in MOE:
        writer.add_expert_count(5)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in MOE:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    add_tokenizer(writer, arch)
    say(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 7)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    with torch.no_grad():
        for known, part in parts(model, names):
            weights, rotated = part.numpy().astype(np.float32), known.split(".")[-2] in heads
            if "norm" in known and arch.startswith("gemma"):
                weights = weights + 1
            if arch == "llama" and rotated:
                weights = permuted(weights, heads[known.split(".")[-2]])
            stored = kind if weights.ndim > 1 else Type.F32
            data = gguf.quants.quantize(weights, stored)
            writer.add_tensor(known, data, raw_dtype=stored)
            back = gguf.quants.dequantize(data, stored).astype(np.float32)
            if arch == "llama" and rotated:
                back = back.reshape(heads[known.split(".")[-2]], -1, 2, back.shape[-1])
                back = back.swapaxes(1, 2)
            elif "norm" in known and arch.startswith("gemma"):
                back = back - 1
            part.copy_(torch.from_numpy(back.reshape(part.shape).copy()).bfloat16())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parts(model: Any, names: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by their names in the file; experts' gate and up are two there."""
    for name, parameter in model.named_parameters():
        layer = "".join(name.split(".")[2:3])
        if name.endswith("experts.gate_up_proj"):
            gate, up = parameter.chunk(2, dim=1)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
        elif name.endswith("experts.down_proj"):
            yield f"blk.{layer}.ffn_down_exps.weight", parameter
        elif name.endswith("shared_expert_gate.weight"):
            yield f"blk.{layer}.ffn_gate_inp_shexp.weight", parameter[0]
        else:
            stem, suffix = name.rsplit(".", 1)
            yield f"{names.get_name(stem)}.{suffix}", parameter


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types, as SentencePiece has them."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [f"<0x{byte:02X}>" for byte in range(256)][: 199 - len(special) - len(PIECES) - 1]
    tokens = [*special, *letters, *PIECES, "<tool>"]
    scores = [0.0] * (len(tokens) - len(PIECES) - 1) + [
        -float(len(PIECES) - len(p)) for p in PIECES
    ]
    types = [3, 3, 3, 2] + [6] * len(letters) + [1] * len(PIECES) + [4]
    return tokens, [*scores, 0.0], types


def add_tokenizer(writer: gguf.GGUFWriter, arch: str) -> None:
    tokens, scores, types = vocabulary()
    writer.add_tokenizer_model("llama")
    if arch.startswith("gemma"):
        tokens = [token.replace("▁", " ") if not token.strip("▁") else token for token in tokens]
        writer.add_add_space_prefix(False)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for add, index in (
        (writer.add_pad_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):
        add(index)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.parametrize("arch", KINDS)
def test_the_folder_computes_what_the_model_did(arch: str, tmp_path: Path) -> None:
    """Its config too: windows, capping, angles by layer, scales."""
    model = original(arch)
    write(tmp_path / f"{arch}.gguf", arch, model, Type.Q8_0)
    folder = prepare(str(tmp_path / f"{arch}.gguf"), tmp_path, Console(quiet=True)).folder
    ours = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(4, 199, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, made = model(tokens).logits, ours(tokens).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    served = read_model(folder)
    assert isinstance(served, ForeignModel if arch.startswith("gemma") else ModelConfig)
    assert served.eos_token_ids == {2}


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
def test_every_type_that_can_be_written_is_read(kind: Type, tmp_path: Path) -> None:
    model = original("qwen2")
    write(tmp_path / "m.gguf", "qwen2", model, kind)
    folder = prepare(str(tmp_path / "m.gguf"), tmp_path, Console(quiet=True)).folder
    found, wanted = load_file(folder / "model.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys() - {"lm_head.weight"} or found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_text_is_split_as_transformers_does(arch: str, tmp_path: Path) -> None:
    """By its own reading of the file: spaces, bytes, merges by score or by place."""
    write(tmp_path / "m.gguf", arch, original(arch), Type.F16)
    folder = prepare(str(tmp_path / "m.gguf"), tmp_path, Console(quiet=True)).folder
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("abcde  ab abc", " a", "a\tb", "<tool>ab</s>", "de  cd", ""):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    assert ours.encode("ab").ids[0] == 1  # the beginning of a sequence
    for text in ("abc  de ab", "a\tb"):
        assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.parametrize("says", [True, False])
def test_sampling_is_as_the_file_recommends(says: bool, tmp_path: Path) -> None:
    """A file that recommends nothing gets nothing of another model's."""

    def say(writer: Any) -> None:
        writer.add_sampling_temp(0.7)
        writer.add_sampling_top_k(20)
        writer.add_sampling_penalty_repeat(1.05)

    file = tmp_path / "m.gguf"
    write(file, "llama", original("llama"), Type.F16, say if says else lambda writer: None)
    folder = prepare(str(file), tmp_path, Console(quiet=True)).folder
    recommended = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}
    assert recommended_sampling(folder) == (recommended if says else {})
