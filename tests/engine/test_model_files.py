"""Model folders: what is read from them, and one clear line for each way to be broken."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from engine.tiny import save_model
from slipstream.engine.model_config import ModelConfig, ModelError
from slipstream.engine.models import Loading, load_model
from slipstream.engine.ranks import Part
from slipstream.engine.weights import load_weights
from slipstream.kernels.reference import Reference
from slipstream.kv.layout import KvLayout

Saved = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the Llama folder that a test may break."""
    for file in saved("llama")[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, *, remove: tuple[str, ...] = (), **changes: Any) -> None:
    file = folder / "config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in settings.items() if k not in remove}))


def load(folder: Path) -> None:
    load_weights(folder, ModelConfig.read(folder), torch.float32, torch.device("cpu"), Reference())


def refusal(folder: Path, act: Callable[[Path], object] = load) -> str:
    with pytest.raises(ModelError) as caught:
        act(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


# --- What is read ---------------------------------------------------------------------------------


def test_the_fields_of_a_config(saved: Saved) -> None:
    config = ModelConfig.read(saved("qwen3_biases")[0])
    assert (config.architecture, config.vocab_size, config.hidden_size) == (
        "Qwen3ForCausalLM",
        199,
        64,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (1, 1, 0, 1)
    assert config.max_position_embeddings == 512 and config.eos_token_ids == {2}


def test_eos_ids_come_from_the_generation_config_first(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text('{"eos_token_id": [2, 9]}')
    assert ModelConfig.read(folder).eos_token_ids == {2, 9}
    file.write_text("{}")
    assert ModelConfig.read(folder).eos_token_ids == {2}
    file.unlink()
    edit(folder, eos_token_id=None)
    assert ModelConfig.read(folder).eos_token_ids == frozenset()


def test_rope_settings_of_older_checkpoints(folder: Path) -> None:
    edit(folder, remove=("rope_parameters",))
    assert ModelConfig.read(folder).rope.theta == 10_000.0
    scaling = {
        "type": "llama3",
        "factor": 32,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 128,
    }
    edit(folder, rope_theta=5e5, rope_scaling=scaling)
    rope = ModelConfig.read(folder).rope
    assert (rope.rope_type, rope.theta, rope.factor) == ("llama3", 5e5, 32.0)
    assert rope.original_max_position_embeddings == 128
    edit(
        folder,
        rope_scaling={"rope_type": "yarn", "factor": None},
        original_max_position_embeddings=64,
    )
    rope = ModelConfig.read(folder).rope
    assert (rope.factor, rope.original_max_position_embeddings) == (8.0, 64)


def test_the_fingerprint_follows_config_and_weights(folder: Path, saved: Saved) -> None:
    first = ModelConfig.read(folder).fingerprint
    assert first == ModelConfig.read(saved("llama")[0]).fingerprint
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for place in (len(data) // 2, len(data) - 1):  # one weight is enough, wherever it is
        changed = bytearray(data)
        changed[place] ^= 1
        weights.write_bytes(changed)
        assert ModelConfig.read(folder).fingerprint != first
    weights.write_bytes(data)
    assert ModelConfig.read(folder).fingerprint == first
    edit(folder, rms_norm_eps=1e-3)
    assert ModelConfig.read(folder).fingerprint != first


def test_shards_load_like_one_file(tmp_path: Path, saved: Saved) -> None:
    save_model(tmp_path, "llama", max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole_folder, device = saved("llama")[0], torch.device("cpu")
    sharded = load_weights(tmp_path, ModelConfig.read(tmp_path), torch.float32, device, Reference())
    whole = load_weights(
        whole_folder, ModelConfig.read(whole_folder), torch.float32, device, Reference()
    )
    assert torch.equal(sharded.layers[2].gate_up.weight, whole.layers[2].gate_up.weight)
    assert torch.equal(sharded.embedding.weight, whole.embedding.weight)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


def test_config_and_layout_need_no_torch(saved: Saved) -> None:
    script = (
        "import sys; from slipstream.engine.model_config import ModelConfig\n"
        "config = ModelConfig.read(sys.argv[1]); config.kv_layout('float32').layout_id('0')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(saved("llama")[0])]
    subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, check=True)


def test_the_engine_does_not_import_transformers() -> None:
    script = "import sys, slipstream.engine.runner; assert 'transformers' not in sys.modules"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_layout() -> None:
    layout = KvLayout(30, 3, 64, "bfloat16")
    assert layout.block_shape == (30, 2, 3, 16, 64)
    assert layout.block_bytes == 30 * 2 * 3 * 16 * 64 * 2
    others = [
        KvLayout(30, 3, 64, "float32"),
        KvLayout(29, 3, 64, "bfloat16"),
        KvLayout(30, 2, 64, "bfloat16"),
        KvLayout(30, 3, 32, "bfloat16"),
        KvLayout(30, 3, 64, "float8_e4m3fn"),
    ]
    ids = {each.layout_id("f" * 64) for each in [layout, *others]}
    ids |= {layout.layout_id("e" * 64), layout.layout_id("f" * 64, "int8")}
    ids |= {others[-1].layout_id("f" * 64, computed_in="bfloat16")}
    assert layout.layout_id("f" * 64, computed_in="bfloat16") in ids
    assert len(ids) == 9 and all(len(each) < 128 for each in ids)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["FancyForCausalLM"]}, "FancyForCausalLM"),
        ({"architectures": []}, "architectures"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"num_local_experts": 8}, "experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"num_experts": 8}, "experts"),
        ({"num_key_value_heads": 3}, "multiple of 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"head_dim": 15}, "even"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit(folder, **changes)
    message = refusal(folder, ModelConfig.read)
    assert named in message and "config.json" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 7}, "7 of 6 experts"),
        ({"num_experts": 0, "num_local_experts": 0}, "3 of 0 experts"),
        ({"moe_intermediate_size": 0}, "size 0"),
        ({"moe_intermediate_size": 44}, "8 does not divide"),
    ],
    ids=str,
)
def test_experts_that_make_no_sense(
    saved: Saved, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    for file in saved("qwen3_moe")[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, **changes)
    assert named in refusal(tmp_path, ModelConfig.read)


def test_int8_experts_are_refused(saved: Saved) -> None:
    folder, _ = saved("mixtral")
    how = Loading(torch.float32, torch.device("cpu"), Reference("int8"))
    assert "give --quantization none" in refusal(
        folder, lambda at: load_model(at, ModelConfig.read(at), how)
    )


@pytest.mark.parametrize(
    ("case", "changes", "served"),
    [
        ("mistral", {"sliding_window": 128}, False),
        ("mistral", {"sliding_window": 512}, True),
        ("mistral", {"remove": ("sliding_window",)}, True),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, True),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, True),  # layer_types: full
        (
            "qwen2",
            {"sliding_window": 128, "use_sliding_window": True, "remove": ("layer_types",)},
            True,
        ),
        (
            "qwen2",
            {
                "sliding_window": 128,
                "use_sliding_window": True,
                "max_window_layers": 2,
                "remove": ("layer_types",),
            },
            False,
        ),
        (
            "qwen3",
            {
                "sliding_window": 128,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            False,
        ),
    ],
    ids=str,
)
def test_only_windows_in_use_are_refused(
    saved: Saved, tmp_path: Path, case: str, changes: dict[str, Any], served: bool
) -> None:
    for file in saved(case)[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, **changes)
    if served:
        ModelConfig.read(tmp_path)
    else:
        assert "sliding window" in refusal(tmp_path, ModelConfig.read)


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no weights" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)
    assert "config.json" in refusal(folder / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"architectures": "x"}', "\xff", "null"])
def test_malformed_configs(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(folder)


def test_malformed_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    assert "generation_config.json" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, b"\x02" + bytes(7) + b"{x", b"\x02" + bytes(7) + b"{}"]
)
def test_corrupt_headers(folder: Path, header: bytes) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(header + weights.read_bytes()[len(header) :])
    refusal(folder)


@pytest.mark.parametrize("link", ["../elsewhere.safetensors", "/etc/passwd", "gone.safetensors"])
def test_an_index_cannot_lead_elsewhere(folder: Path, link: str) -> None:
    index = {"weight_map": {"model.norm.weight": link}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Path(link).name in refusal(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_wrong_and_surplus_tensors(folder: Path, name: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    metadata = {"format": "pt"}
    save_file({key: value for key, value in tensors.items() if key != name}, weights, metadata)
    assert f"{name} is missing" in refusal(folder)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, weights, metadata)
    assert name in refusal(folder) and "shape" in refusal(folder)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, weights, metadata)
    assert "I32" in refusal(folder)
    save_file({**tensors, "model.layers.0.mlp.up_proj.bias": torch.zeros(96)}, weights, metadata)
    assert "mlp.up_proj.bias" in refusal(folder)


def test_surplus_that_transformers_ignores_too(saved: Saved, tmp_path: Path) -> None:
    for file in saved("llama_tied")[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    extra = {
        "lm_head.weight": torch.zeros(199, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    save_file({**load_file(weights), **extra}, weights, {"format": "pt"})
    load(tmp_path)


def test_dummy_weights_are_the_same_everywhere_and_in_parts(saved: Saved, tmp_path: Path) -> None:
    """Whoever makes them, and of two ranks each the rows and columns that are its own."""
    shutil.copy(saved("llama_biases")[0] / "config.json", tmp_path)
    config, device = ModelConfig.read(tmp_path, dummy=True), torch.device("cpu")
    assert config.fingerprint != ModelConfig.read(saved("llama_biases")[0]).fingerprint
    how = tmp_path, config, torch.float32, device, Reference()
    whole, again = (load_weights(*how, dummy=True).layers[0] for _ in range(2))
    parts = [load_weights(*how, part=Part(r, 2), dummy=True).layers[0] for r in (0, 1)]
    assert torch.equal(whole.qkv.weight, again.qkv.weight)
    assert whole.qkv.weight.std() * config.hidden_size**0.5 == pytest.approx(1.0, abs=0.1)
    both = torch.cat([part.down.weight for part in parts], 1)
    assert torch.equal(both, whole.down.weight)
    assert parts[1].down.bias is None and torch.equal(parts[0].down.bias, whole.down.bias)
    split = [part.qkv.weight.split([32, 16, 16]) for part in parts]
    query, key, value = zip(*split, strict=True)
    assert torch.equal(torch.cat([*query, *key, *value]), whole.qkv.weight)
