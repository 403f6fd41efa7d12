"""What config.json says of quantized weights, in all the ways there are of saying it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.quantizers import CLOSE, ROWS, Copies, edited, expected, ours
from engine.tiny import prompt_of
from slipstream.config import ModelImpl
from slipstream.engine.model_config import ModelError
from slipstream.engine.models import read_model
from slipstream.engine.quantized_config import Quantized, read_quantization
from slipstream.engine.runner import Runner, allocate_pool

GPTQ = "gptq: 4 bits"


def compressed_tensors(**groups: dict[str, Any]) -> Quantized:
    given = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    found = read_quantization({"quantization_config": {**given, "config_groups": groups}})
    assert found is not None
    return found


def test_a_scheme_is_by_name_then_by_expression_then_by_class() -> None:
    """As compressed-tensors has it, in whichever order the groups stand."""
    found = compressed_tensors(
        a={"targets": ["re:.*_proj"], "weights": {"num_bits": 8, "group_size": 32}},
        b={"targets": ["Embedding"], "weights": {"num_bits": 8, "group_size": 64}},
        c={"targets": ["Linear"], "weights": {"num_bits": 4}},
        d={"targets": ["model.layers.0.self_attn.q_proj"], "weights": {"type": "float"}},
        e={"targets": ["lm_head"], "weights": {"num_bits": 8, "group_size": 128}},
    )
    assert found.scheme("model.layers.3.mlp.down_proj").group == 32
    assert found.scheme("model.layers.0.self_attn.q_proj").number == "float"
    assert found.scheme("model.layers.1.mlp.experts").bits == 4
    assert found.scheme("model.embed_tokens").group == 64
    assert found.scheme("lm_head").group == 128
    assert found.word(None) == "w8a16+w4a16+fp8-w8a16"
    assert found.scheme("embed_out").bits == 4  # GPT-NeoX's head
    other = compressed_tensors(
        a={"targets": ["Attention"], "weights": {"num_bits": 8}},
        b={"targets": ["Linear"], "weights": {"num_bits": 4}},
    )
    assert other.scheme("model.layers.0.self_attn.q_proj").bits == 4
    alone = compressed_tensors(a={"targets": ["Linear"], "weights": {"num_bits": 4}})
    assert alone.scheme("model.embed_tokens").bits == 4


def test_modules_may_have_bits_and_groups_of_their_own(copies: Copies, tmp_path: Path) -> None:
    """GPTQModel's `dynamic`."""
    folder, plain = (shutil.copytree(each, tmp_path / each.name) for each in copies("llama", GPTQ))
    other, meant = copies("llama", "gptq: 8 bits")
    for target, source in ((folder, other), (plain, meant)):
        file = target / "model.safetensors"
        tensors, own = load_file(file), load_file(source / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
        theirs = {name: tensor for name, tensor in own.items() if "layers.1.mlp" in name}
        save_file(kept | theirs, file, {"format": "pt"})
    own_of = {"-:lm_head": {}, r"+:.*\.1\.mlp\..*": {"bits": 8, "group_size": 64}}
    edited(folder, dynamic=own_of)
    tokens = prompt_of(40)
    wanted = expected(plain, tokens)[[32, 39]]
    torch.testing.assert_close(ours(folder, tokens), wanted, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("word", ["checkpoint_format", "format"])
def test_the_second_version_of_gptq_has_two_names(
    copies: Copies, tmp_path: Path, word: str
) -> None:
    """Zero points are one off if it is not seen."""
    source, plain = copies("llama", "gptq: 4 bits, channels, second version")
    folder = shutil.copytree(source, tmp_path / "copy")
    edited(folder, **{"checkpoint_format": None, word: "gptq_v2"})
    tokens = prompt_of(40)
    wanted = expected(plain, tokens)[[32, 39]]
    torch.testing.assert_close(ours(folder, tokens), wanted, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_other_places_of_the_same(place: str) -> None:
    given = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    inside = {"quantization_config": given} if place == "text_config" else given
    found = read_quantization({place: inside})
    assert found is not None and found.schemes[0][1].group == 32


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("form", [ROWS, "fp8: float8, one scale", "gptq: 4 bits"])
def test_levels_are_not_taken_for_weights(
    copies: Copies, tmp_path: Path, form: str, impl: ModelImpl
) -> None:
    """Where config.json does not say that they are levels."""
    folder = shutil.copytree(copies("llama", form)[0], tmp_path / "copy")
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    del settings["quantization_config"]
    file.write_text(json.dumps(settings))
    config = read_model(folder, impl)
    pool = allocate_pool(config.kv_layout("float32"), 8)
    with pytest.raises(ModelError, match=r"is quantized .* config.json does not say how"):
        Runner(folder, "float32", pool, threads=2, config=config)
