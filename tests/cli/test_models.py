"""Model folders: what is refused, with which words, and that a GGUF file comes out right."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from cli.fakes import write_model
from slipstream.cli.gguf_folder import _unpermute, hf_name, model_config
from slipstream.cli.gguf_kinds import KINDS, llama3_factors
from slipstream.cli.gguf_tokenizer import build_tokenizer
from slipstream.cli.model_error import ModelError
from slipstream.cli.models import DEMO_NAME, demo_file, models_dir, prepare

CONSOLE = Console(quiet=True)


def refusal(spec: object, cache: Path) -> str:
    with pytest.raises(ModelError) as caught:
        prepare(str(spec), cache, CONSOLE)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    model = prepare(str(write_model(tmp_path / "toy")), tmp_path, CONSOLE)
    assert (model.folder, model.name) == (tmp_path / "toy", "toy")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "No such file"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"[]", "expected a JSON object"),
        ("config.json", b"{}", "model_type is missing"),
        ("config.json", b"[" * 100_000, "not JSON"),
        ("tokenizer.json", None, "No such file"),
        ("tokenizer.json", b"\xff\xfe", "not JSON"),
        ("generation_config.json", b"nonsense", "not JSON"),
        ("model.safetensors", None, "No such file"),
        ("model.safetensors", b"", "not a safetensors file"),
        ("model.safetensors", b"\xff" * 64, "not a safetensors file"),
        ("model.safetensors", struct.pack("<Q", 4) + b"{no}", "header is damaged"),
        ("model.safetensors", struct.pack("<Q", 2) + b"{}", "header is damaged"),
        ("model.safetensors", struct.pack("<Q", 8) + b'{"w": 1}', "header is damaged"),
        ("model.safetensors.index.json", b"{}", "weight_map is missing"),
        ("model.safetensors.index.json", b'{"weight_map": {"w": "../x"}}', "is not a file name"),
        ("model.safetensors.index.json", b'{"weight_map": {"w": "lost"}}', "No such file"),
    ],
)
def test_damaged_folder(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    folder = write_model(tmp_path / "toy")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    line = refusal(folder, tmp_path)
    assert message in line
    assert str(folder) in line


def test_dummy_weights_need_no_files_but_all_others(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy")
    (folder / "model.safetensors").unlink()
    assert prepare(str(folder), tmp_path, CONSOLE, weights=False).folder == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        prepare(str(folder), tmp_path, CONSOLE, weights=False)


def test_weights_cut_short(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy")
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    expected = f"{weights}: {len(raw) - 1} bytes instead of {len(raw)}"
    assert refusal(folder, tmp_path).startswith(expected)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    (tmp_path / "empty.gguf").touch()
    assert "expected a folder or a .gguf file" in refusal(tmp_path / "text.txt", tmp_path)
    assert "not a readable GGUF file" in refusal(tmp_path / "bad.gguf", tmp_path)
    assert "not a readable GGUF file" in refusal(tmp_path / "empty.gguf", tmp_path)
    assert "no such folder or file; give one, a hub id" in refusal(tmp_path / "none", tmp_path)
    assert "did you mean demo?" in refusal("demmo", tmp_path)
    leftovers = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert not leftovers


def test_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    line = refusal("someone/something", tmp_path)
    assert line.startswith("someone/something: no such folder, and the download failed: no route")


def test_models_dir_honours_xdg() -> None:
    assert models_dir({"XDG_CACHE_HOME": "/c"}) == Path("/c/slipstream/models")
    assert models_dir({}) == Path.home() / ".cache" / "slipstream" / "models"


def test_tensor_without_a_place_is_refused() -> None:
    llama = KINDS["llama"]
    assert hf_name("blk.3.attn_q.weight", llama) == "model.layers.3.self_attn.q_proj.weight"
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.attn_q.scale", "mm.0.weight"):
        with pytest.raises(ModelError, match="has no place"):
            hf_name(name, llama)


def fields(**more: object) -> dict[str, object]:
    return {
        "general.architecture": "llama",
        "llama.attention.head_count": 4,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.tokens": ["a", "b"],
        **more,
    }


def test_config_is_written_with_the_numbers_that_were_meant() -> None:
    config = model_config(fields(), {})
    assert config["rms_norm_eps"] == 1e-5
    assert config["num_key_value_heads"] == 4
    assert config["tie_word_embeddings"]
    assert "rope_scaling" not in config


def test_llama3_rope_is_recognised_and_other_tables_are_refused() -> None:
    class Tensor:
        def __init__(self, data: object) -> None:
            self.data = data

    wanted = fields(**{"llama.rope.freq_base": 500000.0, "llama.attention.key_length": 16})
    table = llama3_factors(32.0, 500000.0, 16)
    config = model_config(wanted, {"rope_freqs.weight": Tensor(table)})
    assert config["rope_scaling"]["factor"] == 32.0
    with pytest.raises(ModelError, match="fit no rope scaling"):
        model_config(wanted, {"rope_freqs.weight": Tensor(table * 2)})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture mamba is not read"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling longrope is not read"),
    ],
)
def test_config_that_would_be_a_guess(more: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_config(fields(**more), {})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "of kind t5"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "pre-tokenizer new"),
    ],
)
def test_tokenizer_that_would_be_a_guess(more: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_tokenizer(fields(**{"tokenizer.ggml.merges": [], **more}))


@pytest.fixture(scope="module")
def demo() -> Path:
    """The demo folder in the user's own cache, as `make test` has prepared it."""
    return prepare("demo", models_dir(os.environ), CONSOLE).folder


def test_demo_tokenizer(demo: Path) -> None:
    """Digits one by one, as SmolLM2 was trained; special tokens are one token each."""
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    tokens = tokenizer.encode("<|im_start|>user\nIn 2024 I'd  go").tokens
    assert tokens == ["<|im_start|>", "user", "Ċ", "In", "Ġ", *"2024", "ĠI", "'d", "Ġ", "Ġgo"]
    text = "naïve 日本語 🙂\t  x\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_demo_folder(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    assert demo.name == DEMO_NAME
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (30, 3)
    generation = json.loads((demo / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == 2
    assert (generation["temperature"], generation["top_p"]) == (0.2, 0.9)  # its makers' words
    chat = json.loads((demo / "tokenizer_config.json").read_text())["chat_template"]
    assert "<|im_start|>assistant" in chat


def test_demo_is_prepared_only_once(demo: Path) -> None:
    before = (demo / "model.safetensors").stat().st_mtime_ns
    assert prepare("demo", demo.parent, CONSOLE).folder == demo
    assert (demo / "model.safetensors").stat().st_mtime_ns == before


def test_cut_gguf_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_file().read_bytes()[: 20 * 2**20])
    assert refusal(cut, tmp_path).startswith(f"{cut}: not a readable GGUF file")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_demo_weights_equal_what_transformers_reads(demo: Path) -> None:
    """Transformers' own GGUF loading is the specification, the un-permutation included."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo))
    theirs = load_gguf_checkpoint(str(demo_file()), return_tensors=True, model_to_load=model)
    ours = load_file(demo / "model.safetensors")
    expected = theirs["tensors"]
    assert ours.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_llama_permutation_is_undone() -> None:
    """llama.cpp's permutation (`LlamaModel.permute`), then ours, is nothing."""
    weights = np.arange(4 * 8 * 3, dtype=np.float32).reshape(32, 3)
    swapped = weights.reshape(4, 2, 4, 3).swapaxes(1, 2).reshape(32, 3)
    assert np.array_equal(_unpermute(swapped, 4), weights)


def test_a_disk_that_is_too_full_says_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(b"x" * 1024)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5119))
    said = refusal(source, tmp_path / "cache")
    assert "5.0KiB free, 5KiB are needed to convert the model; make room" in said
