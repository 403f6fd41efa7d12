"""Quantized checkpoints give what their quantizers say that they stand for."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.architectures import tiny_config, tiny_model
from engine.models_page import format_row
from engine.quantizers import (
    CLOSE,
    FORMATS,
    ROWS,
    Copies,
    edited,
    expected,
    is_right,
    ours,
    quantized,
    to_int8,
    transformers,
    with_rounded_rows,
)
from engine.tiny import Bench, generate, greedy, prompt_of
from slipstream.decode.config import DecodeConfig
from slipstream.engine.backends import weights_word
from slipstream.engine.model_config import ForeignModel, ModelConfig, ModelError
from slipstream.engine.models import read_model
from slipstream.engine.ranks import Part
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.engine.weights import load_weights
from slipstream.engine.worker_parts import make_pool, plan_of
from slipstream.kernels.build import VARIABLE
from slipstream.kernels.gpu.backend import Matrix
from slipstream.kernels.gpu.levels import Grouped
from slipstream.kernels.reference import Reference

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PLAIN = [name for name in FORMATS if name != ROWS]
SOON = {PLAIN[1], PLAIN[2], ROWS, "gptq: 4 bits, zero points, desc_act", "fp8: float8, one scale"}
"""Tried in the interpreter by `make test`; the others by `make test-all`."""


def runner_for(folder: Path, **how: Any) -> Runner:
    pool = allocate_pool(read_model(folder).kv_layout("float32"), 64)
    return Runner(folder, "float32", pool, threads=2, **how)


@pytest.mark.parametrize("form", PLAIN)
@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_logits_are_those_of_the_numbers_meant(copies: Copies, case: str, form: str) -> None:
    folder, plain = copies(case, form)
    tokens = prompt_of(70)
    wanted = expected(plain, tokens)
    assert wanted.std() > 0.5
    torch.testing.assert_close(ours(folder, tokens), wanted[[32, 69]], rtol=CLOSE, atol=CLOSE)
    assert is_right(form, folder, plain)
    config = ModelConfig.read(folder)
    assert config.quantized is not None
    assert weights_word(config, "none", CPU) == FORMATS[form].word


@pytest.mark.parametrize("form", ["gptq: 4 bits, zero points, desc_act", "awq: 4 bits, gemm"])
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_experts_are_made_plain(copies: Copies, case: str, form: str) -> None:
    folder, plain = copies(case, form)
    tokens = prompt_of(40)
    wanted = expected(plain, tokens)[[32, 39]]
    torch.testing.assert_close(ours(folder, tokens), wanted, rtol=CLOSE, atol=CLOSE)


def by_transformers_code(folder: Path, plain: Path) -> None:
    config = read_model(folder, "transformers")
    assert isinstance(config, ForeignModel)
    pool = allocate_pool(config.kv_layout("float32"), 64)
    runner = Runner(folder, "float32", pool, threads=2, config=config)
    prompt = prompt_of(50)
    made = generate(runner, prompt, greedy(ignore_eos=True), 8)
    logits = expected(plain, prompt + made)
    assert made == tuple(logits[49:-1].argmax(1).tolist())
    assert weights_word(config, "none", CPU).endswith("a16")


@pytest.mark.parametrize(
    ("case", "form"),
    [
        *(("llama", form) for form in (PLAIN[0], "gptq: 8 bits", "fp8: float8, blocks", ROWS)),
        ("mixtral", "awq: 4 bits, gemm"),
    ],
)
def test_transformers_code_serves_them_made_plain(copies: Copies, case: str, form: str) -> None:
    by_transformers_code(*copies(case, form))


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "olmo2", "gpt_neox"])
def test_so_do_architectures_that_are_not_ours(tmp_path: Path, model_type: str) -> None:
    source, folder = tmp_path / "source", tmp_path / "quantized"
    tiny_model(tiny_config(model_type)).save_pretrained(source)
    by_transformers_code(folder, quantized(source, folder, FORMATS["gptq: 4 bits"]))


@pytest.mark.parametrize("form", PLAIN)
def test_tokens_are_those_of_the_numbers_meant(copies: Copies, form: str) -> None:
    folder, plain = copies("llama", form)
    prompt = prompt_of(60, 5)
    sampling = greedy(ignore_eos=True)
    made = generate(runner_for(folder), prompt, sampling, 12)
    assert made == generate(runner_for(plain), prompt, sampling, 12)


# --- int8 by int8 ---------------------------------------------------------------------------------


def to_int8_by_the_library(x: Tensor) -> Tensor:
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    return fake_quantize(x, scale, zero, args)


def test_int8_is_multiplied_with_int8(copies: Copies) -> None:
    folder, plain = copies("llama", ROWS)
    assert weights_word(ModelConfig.read(folder), "none", CPU) == "w8a8"
    assert is_right(ROWS, folder, plain)
    tokens = prompt_of(70)
    exact = expected(plain, tokens)[[32, 69]]
    made = []
    for rounded in (to_int8, to_int8_by_the_library):
        model = transformers(plain)
        with_rounded_rows(model, rounded)
        with torch.no_grad():
            made.append(model(torch.tensor([tokens])).logits[0, [32, 69]])
    off = (made[0] - exact).norm()
    assert off > 0.03 * exact.norm()  # else it would show nothing
    mine = ours(folder, tokens)
    # A level that is rounded otherwise, for 0.5 lies there, is nothing beside that.
    assert (mine - made[0]).norm() < 0.2 * off
    # The library divides by 127.5, not 127: as near to the plain ones.
    assert (mine - exact).norm() < 1.5 * (made[1] - exact).norm()


def test_the_page_says_what_comes_out() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    assert {format_row(name) for name in FORMATS} <= set(lines), "run `make docs`"


# --- What is refused, and what is told apart ------------------------------------------------------


@pytest.fixture
def folder(copies: Copies, tmp_path: Path) -> Path:
    """Of GPTQ, that a test may break."""
    for file in copies("llama", "gptq: 4 bits")[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refusal(folder: Path, **how: Any) -> str:
    with pytest.raises(ModelError) as caught:
        runner_for(folder, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "(bitsandbytes) are not supported (only compressed-"),
        ({"bits": 3}, "(gptq) of bits 3 are not supported (only 4, 8)"),
        ({"checkpoint_format": "marlin"}, "format marlin are not supported (only gptq, gptq_v2)"),
        ({"is_marlin_format": True}, "format marlin"),
        ({"bits": "four"}, "quantization_config (gptq): Expected `int`"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv are not supported (only gemm)"),
        ({"quant_method": "awq", "backend": "llm-awq"}, "backend llm-awq are not supported"),
        ({"dynamic": {"+:.*": {"bits": 3}}}, "(gptq) of bits 3 are not supported (only 4, 8)"),
        ({"quant_method": "awq", "bits": 8}, "bits 8 are not supported (only 4)"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt e5m2 are not supported"),
        ({"quant_method": None}, "quantized weights (None) are not supported"),
        ({"group_size": 48}, "q_proj (gptq): groups of inputs are not of 48"),
    ],
)
def test_what_is_not_supported_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    edited(folder, **changes)
    line = refusal(folder)
    assert said in line and str(folder) in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
        ({"config_groups": {}}, "config_groups names none"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 3}}}}, "bits 3"),
        ({"config_groups": {"a": {"targets": ["re:("], "weights": {}}}}, "targets: "),
        (
            {"config_groups": {"a": {"targets": [], "weights": {"num_bits": 4, "type": "float"}}}},
            "float bits 4 are not supported (only 8)",
        ),
    ],
)
def test_what_compressed_tensors_can_and_we_cannot_is_refused(
    copies: Copies, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    for file in copies("llama", PLAIN[0])[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edited(tmp_path, **changes)
    assert said in refusal(tmp_path)


def test_nothing_is_quantized_twice(folder: Path) -> None:
    line = refusal(folder, quantization="int8")
    assert "quantized already (gptq); give --quantization none" in line


def test_dummy_weights_are_not_quantized(folder: Path) -> None:
    with pytest.raises(ModelError, match="take quantization_config out of a copy"):
        ModelConfig.read(folder, dummy=True)


@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "number"])
def test_broken_tensors_are_named(folder: Path, damage: str) -> None:
    file, module = folder / "model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    if damage == "missing":
        del tensors[f"{module}.scales"]
    elif damage == "shape":
        tensors[f"{module}.scales"] = tensors[f"{module}.scales"][:-1].contiguous()
    elif damage == "dtype":
        tensors[f"{module}.qweight"] = tensors[f"{module}.qweight"].long()
    else:
        tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"][:-3].contiguous()
    save_file(tensors, file, {"format": "pt"})
    assert module in refusal(folder)


def test_biases_of_zeros_are_no_biases(folder: Path) -> None:
    """Of a model that has none; older versions of AutoGPTQ wrote them."""
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.bias"
    tensors = {**load_file(file), name: torch.zeros(256)}
    save_file(tensors, file, {"format": "pt"})
    runner_for(folder)
    save_file({**tensors, name: torch.ones(256)}, file, {"format": "pt"})
    assert f"does not account for tensor {name}" in refusal(folder)


def test_modules_that_are_left_plain_are_served_plain(folder: Path, copies: Copies) -> None:
    plain = copies("llama", "gptq: 4 bits")[1]
    tensors, meant = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        tensors = {k: v for k, v in tensors.items() if not k.startswith(module)}
        tensors[f"{module}.weight"] = meant[f"{module}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokens = prompt_of(40)
    wanted = expected(plain, tokens)[[32, 39]]
    torch.testing.assert_close(ours(folder, tokens), wanted, rtol=CLOSE, atol=CLOSE)


def test_scales_of_a_kv_cache_are_said_to_be_unused(
    copies: Copies, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = copies("llama", PLAIN[0])
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edited(tmp_path, kv_cache_scheme={"num_bits": 8, "type": "float"})
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{name}_scale": torch.ones(1) for name in "kv"}
    for name in "kv":
        scales[f"model.layers.0.self_attn.{name}_zero_point"] = torch.ones(1, dtype=torch.int8)
    save_file({**tensors, **scales}, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = prompt_of(40)
    torch.testing.assert_close(ours(tmp_path, tokens), ours(folder, tokens))
    assert "KV cache" not in caplog.text
    runner_for(tmp_path)
    assert "scales for a float8 KV cache are not used" in caplog.text


def test_blocks_of_what_is_computed_otherwise_are_kept_apart(
    copies: Copies, tmp_path: Path
) -> None:
    for form in (ROWS, "awq: 4 bits, gemm"):
        folder, plain = copies("llama", form)
        ids = {}
        for model in (folder, plain):
            config = DecodeConfig(
                model=str(model), node_id="decode-0", shm_dir=str(tmp_path), run_dir=str(tmp_path)
            )
            plan = plan_of(config, read_model(model))
            with closing(make_pool(config, plan, 1, 2)) as segment:
                ids[model] = segment.header.kv_layout_id
        assert ids[folder].endswith(f"/{FORMATS[form].word}")
        assert len(set(ids.values())) == 2


# --- In parts, and on a GPU -----------------------------------------------------------------------


@pytest.mark.parametrize("form", PLAIN)
def test_ranks_have_their_parts(copies: Copies, form: str) -> None:
    folder, plain = copies("qwen2", form)
    config = ModelConfig.read(folder)
    for rank in range(2):
        part = Part(rank, 2)
        mine, wanted = (
            load_weights(each, config_of, torch.float32, CPU, Reference(), part=part)
            for each, config_of in ((folder, config), (plain, ModelConfig.read(plain)))
        )
        for one, other in zip(mine.layers, wanted.layers, strict=True):
            for name in ("qkv", "output", "gate_up", "down"):
                found, meant = getattr(one, name), getattr(other, name)
                torch.testing.assert_close(found.weight, meant.weight, rtol=1e-6, atol=1e-7)
                assert (found.bias is None) == (meant.bias is None)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would, in Triton's interpreter."""
    monkeypatch.setenv(VARIABLE, "triton")


@pytest.mark.parametrize(
    "form",
    [form if form in SOON else pytest.param(form, marks=pytest.mark.slow) for form in FORMATS],
)
def test_a_gpu_multiplies_with_levels(copies: Copies, on_triton: None, form: str) -> None:
    """int8 with rows as they are: what is there for int8 rows is a CPU's."""
    folder, plain = copies("qwen2", form)
    config, tokens = ModelConfig.read(folder), prompt_of(19)
    model = transformers(plain)
    word = weights_word(config, "none", CPU)
    if word == "fp8-w8a8":
        with_rounded_rows(model, to_float8)
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0, -1]
    bench = Bench(folder, blocks=4)
    made = bench.logits((tokens, 0, (3, 1)))[0]
    if word == "fp8-w8a8":
        assert (made - wanted).norm() < 0.1 * (wanted - expected(plain, tokens)[-1]).norm()
    else:
        torch.testing.assert_close(made, wanted, rtol=CLOSE, atol=CLOSE)
    weights = load_weights(folder, config, torch.float32, CPU, bench.backend)
    kind = Matrix if word == "fp8-w8a8" else Grouped
    for layer in weights.layers:
        assert isinstance(layer.qkv, kind) and isinstance(layer.down, kind)


def to_float8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
