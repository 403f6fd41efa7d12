"""Packed weights come back from their file as they were, or are packed again."""

import logging
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.tiny import generate, greedy, prompt_of, save_model
from slipstream.engine.backends import choose_backend
from slipstream.engine.decoder import DecoderWeights
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.packed_file import FILES_MAX, BrokenFile, file_name, read, shared_weights
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.engine.weights import load_weights
from slipstream.kernels.ops import Quantization
from slipstream.kernels.panels import Packed
from slipstream.kernels.program import CpuBackend

Saved = Callable[[str], tuple[Path, object]]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled(saved: Saved) -> None:
    folder, _ = saved("llama")
    if not isinstance(choose_backend(ModelConfig.read(folder), torch.float32, CPU), CpuBackend):
        pytest.skip("no CPU kernels here: weights are not packed")


class Counted:
    """Packs, and counts how often."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        quantization: Quantization = "none",
    ):
        self.folder, self.dtype, self.quantization, self.times = folder, dtype, quantization, 0
        self.config = ModelConfig.read(folder)

    def __call__(self) -> DecoderWeights:
        self.times += 1
        backend = choose_backend(self.config, self.dtype, CPU, self.quantization)
        return load_weights(self.folder, self.config, self.dtype, CPU, backend)

    def name(self) -> str:
        return file_name(self.folder, self.config, self.dtype, self.quantization)


def tensors(weights: DecoderWeights) -> list[Tensor]:
    found: list[Tensor | None] = [weights.norm]
    matrices: list[Packed] = [weights.embedding, weights.lm_head]
    for layer in weights.layers:
        found += [layer.attention_norm, layer.mlp_norm, *(layer.head_norms or ())]
        matrices += [layer.qkv, layer.output, layer.gate_up, layer.down]
    for matrix in matrices:
        found += [matrix.panels, matrix.bias, matrix.scale, matrix.sums]
    return [tensor for tensor in found if tensor is not None]


def equal(one: DecoderWeights, other: DecoderWeights) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama", "llama_tied", "llama_biases", "qwen3"])
def test_what_is_mapped_is_what_was_packed(
    saved: Saved,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    case: str,
    dtype: torch.dtype,
    quantization: Quantization,
) -> None:
    pack = Counted(saved(case)[0], dtype, quantization)
    path = tmp_path / "deep" / pack.name()
    first, second = (shared_weights(path, pack) for _ in range(2))
    assert pack.times == 1 and not caplog.text
    wanted = pack()
    assert equal(first, wanted) and equal(second, wanted)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors(second))
    tied = wanted.lm_head.panels is wanted.embedding.panels
    assert (second.lm_head.panels is second.embedding.panels) == tied
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_from_the_file_answers_as_one_that_was_packed(
    saved: Saved, tmp_path: Path, quantization: Quantization
) -> None:
    folder, _ = saved("qwen3")
    layout = ModelConfig.read(folder).kv_layout("float32")

    def answer(packed_dir: Path | None) -> tuple[int, ...]:
        pool = allocate_pool(layout, 40)
        runner = Runner(folder, "float32", pool, quantization=quantization, packed_dir=packed_dir)
        return generate(runner, prompt_of(50), greedy(), 12)

    assert answer(None) == answer(tmp_path) == answer(tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_file_is_noticed_and_made_again(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """A flipped bit anywhere, in the header too; a file that ends early, or is empty."""
    pack = Counted(saved("llama")[0])
    path = tmp_path / pack.name()
    wanted = shared_weights(path, pack)
    whole = path.read_bytes()
    draw = random.Random(seed)
    if seed % 3 == 0:
        damaged = whole[: draw.choice([0, 1, 30, 60, draw.randrange(len(whole))])]
    else:
        at = draw.randrange(400 if seed % 3 == 1 else len(whole))
        damaged = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
    path.unlink()  # not in place: somebody may have it mapped
    path.write_bytes(damaged)
    with pytest.raises(BrokenFile):
        read(path)
    with caplog.at_level(logging.WARNING):
        assert equal(shared_weights(path, pack), wanted)
    assert pack.times == 2 and "packed again" in caplog.text
    assert path.read_bytes() == whole


def test_the_name_says_what_is_in_it(tmp_path: Path, saved: Saved) -> None:
    folder, _ = saved("llama")
    names = {
        Counted(folder, dtype, quantization).name()
        for dtype in (torch.float32, torch.bfloat16)
        for quantization in ("none", "int8")
    }
    assert len(names) == 4
    save_model(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    before = Counted(tmp_path).name()
    os.utime(file, (1, 1))  # written anew: its fingerprint does not look at the middle
    assert Counted(tmp_path).name() != before


@pytest.mark.parametrize("obstacle", ["a file in the way", "little room", "it ends while written"])
def test_without_a_place_for_the_file_it_goes_on(
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: str,
) -> None:
    pack = Counted(saved("llama")[0])
    folder = tmp_path / "weights"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    match obstacle:
        case "a file in the way":
            folder.write_text("")
        case "little room":
            usage = shutil.disk_usage(tmp_path)._replace(free=1000)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        case _:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            weights = shared_weights(folder / pack.name(), pack)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pack.times == 1 and equal(weights, pack())
    assert "not kept" in caplog.text
    assert not folder.is_dir() or not list(folder.iterdir())


def test_files_that_nobody_used_go(saved: Saved, tmp_path: Path) -> None:
    pack = Counted(saved("llama")[0])
    used = tmp_path / "used.packed"
    shared_weights(used, pack)
    for index in range(FILES_MAX + 3):
        shared_weights(tmp_path / f"{index}.packed", pack)
        os.utime(tmp_path / f"{index}.packed", (index, index))
        shared_weights(used, pack)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == FILES_MAX and "used.packed" in left and "0.packed" not in left
