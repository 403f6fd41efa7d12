"""Folders that Transformers' code serves, through the runner; one clear line for each refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.architectures import tiny_config, tiny_model
from engine.tiny import admission, generate, greedy, prompt_of, save_model
from slipstream.core.machine import BatchPlan, Row
from slipstream.engine.model_config import ForeignModel, ModelConfig, ModelError
from slipstream.engine.models import Loading, load_model, read_model
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.kernels.reference import Reference

CPU = torch.device("cpu")
Folders = Callable[[str], Path]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Model type -> a tiny model's folder, made once."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            tiny_model(tiny_config(model_type)).save_pretrained(made[model_type])
        return made[model_type]

    return get


def copied(source: Path, folder: Path, **changes: Any) -> Path:
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def refusal(folder: Path, impl: Any = "auto") -> str:
    """Of its start, or once it is loaded."""
    with pytest.raises(ModelError) as caught:
        config = read_model(folder, impl)
        assert isinstance(config, ForeignModel)
        load_model(folder, config, Loading(torch.float32, CPU, Reference()))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "phi3", "gemma3"])
def test_answers_are_those_of_generate(folders: Folders, model_type: str) -> None:
    folder = folders(model_type)
    config = read_model(folder)
    assert isinstance(config, ForeignModel)
    pool = allocate_pool(config.kv_layout("float32"), 40).fill_(torch.nan)
    runner = Runner(folder, "float32", pool, config=config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for length in (1, 17, 60):
        prompt = prompt_of(length, length)
        with torch.no_grad():
            made = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=20, min_new_tokens=20
            )
        banned = greedy(min_tokens=20)
        assert generate(runner, prompt, banned, 20) == tuple(made[0, length:].tolist())


def test_a_chunk_that_samples_nothing(folders: Folders) -> None:
    """It yields no logits; the next one goes on."""
    config = read_model(folders("gemma2"))
    pool = allocate_pool(config.kv_layout("float32"), 8).fill_(torch.nan)
    runner = Runner(folders("gemma2"), "float32", pool, config=config)
    prompt, blocks = prompt_of(60), (3, 0, 5, 1)
    whole = generate(runner, prompt, greedy(), 1, blocks=(2, 4, 6, 7))
    admitted = (admission("c", prompt, greedy()),)
    first, second = (
        Row("c", 1, prompt[:40], 0, blocks, False),
        Row("c", 1, prompt[40:], 40, blocks, True),
    )
    assert not any(output.tokens for output in runner.run(BatchPlan(0, (first,), admitted)))
    (output,) = runner.run(BatchPlan(1, (second,)))
    assert output.tokens == whole


def test_who_serves(folders: Folders, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    native, foreign = read_model(tmp_path), read_model(tmp_path, "transformers")
    assert isinstance(native, ModelConfig) and isinstance(foreign, ForeignModel)
    assert native.kv_layout("float32") == foreign.kv_layout("float32")
    assert (native.vocab_size, native.dtype) == (foreign.vocab_size, foreign.dtype)
    assert native.eos_token_ids == foreign.eos_token_ids
    # Their last bits differ, so their blocks do not mix.
    assert native.fingerprint != foreign.fingerprint
    line = refusal(folders("gemma2"), "native")
    assert "Gemma2ForCausalLM" in line and "Transformers" not in line


def test_bfloat16_proves_itself(folders: Folders) -> None:
    for model_type in ("gemma2", "mixtral"):
        config = read_model(folders(model_type), "transformers")
        assert isinstance(config, ForeignModel)
        load_model(folders(model_type), config, Loading(torch.bfloat16, CPU, Reference()))


def test_windows_are_read_by_whom_they_are_served(folders: Folders, tmp_path: Path) -> None:
    """A Mistral without a window is ours, one with a window is not."""
    whole = copied(folders("mistral"), tmp_path, sliding_window=None)
    assert isinstance(read_model(whole), ModelConfig)
    windowed = read_model(folders("mistral"))
    assert isinstance(windowed, ForeignModel) and {r.window for r in windowed.reaches} == {24}


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("mamba", "some of its layers are of kind linear_attention"),
        ("bloom", "its layers work on attention masks themselves"),
        ("deepseek_v3", "a layer has keys of 40 and values of 32 elements"),
        ("falcon", "its attention is its own"),
    ],
)
def test_both_reasons_are_told(folders: Folders, model_type: str, why: str) -> None:
    line = refusal(folders(model_type))
    assert "is not supported (only Llama" in line and f"cannot run on KV blocks: {why}" in line


def test_code_of_a_folder_is_not_run(folders: Folders, tmp_path: Path) -> None:
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    folder = copied(folders("gemma2"), tmp_path, model_type="evil", auto_map=auto)
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    assert "cannot" not in refusal(folder, "transformers") and not ran.exists()


def test_quantized_weights_are_refused(folders: Folders, tmp_path: Path) -> None:
    folder = copied(folders("gemma2"), tmp_path, quantization_config={"quant_method": "mxfp4"})
    assert "quantized weights (mxfp4) are not supported" in refusal(folder)


def test_int8_is_of_the_native_decoder(folders: Folders) -> None:
    config = read_model(folders("gemma2"))
    pool = allocate_pool(config.kv_layout("float32"), 4)
    with pytest.raises(ModelError, match="give --quantization none"):
        Runner(folders("gemma2"), "float32", pool, quantization="int8")


@pytest.mark.parametrize("damage", ["missing", "shape", "short", "none"])
def test_damaged_weights(folders: Folders, tmp_path: Path, damage: str) -> None:
    folder = copied(folders("gemma2"), tmp_path)
    weights, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    if damage == "missing":
        save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    elif damage == "shape":
        save_file({**tensors, name: tensors[name][:-1].contiguous()}, weights, {"format": "pt"})
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        weights.rename(folder / "pytorch_model.bin")
    line = refusal(folder)
    assert {
        "missing": f"{name} is missing",
        "shape": f"{name} has shape",
        "short": "",
        "none": "no weights",
    }[damage] in line
