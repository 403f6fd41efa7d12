"""The compiled operations against the reference, over shapes that people do not think of."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.kernels import cpu
from slipstream.kernels.build import (
    LEVELS,
    VARIABLE,
    chosen_level,
)
from slipstream.kernels.drawn import (
    ADAPTED,
    BLOCK_TOKENS,
    CASES,
    EPSILON,
    TOLERANCE,
    Shapes,
    batch_of,
    outcome,
)
from slipstream.kernels.ops import NO_ADAPTER, Backend, Heads, Model, Quantization
from slipstream.kernels.program import CpuBackend
from slipstream.kernels.reference import Reference

DTYPES = [torch.float32, torch.bfloat16]
SEEDS = range(15)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch, which would wait for its own at each of the reference's many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_operations_agree_with_the_reference(
    compiled: ctypes.CDLL, name: str, dtype: torch.dtype, threads: int, quantization: Quantization
) -> None:
    relative, absolute = TOLERANCE[dtype]
    backend = CpuBackend(compiled, threads, dtype, quantization)
    for seed in SEEDS:
        case = getattr(Shapes(seed, dtype), name)()
        expected, actual = outcome(Reference(quantization), case), outcome(backend, case)
        for one, other in zip(expected, actual, strict=True):
            torch.testing.assert_close(
                other,
                one,
                rtol=relative,
                atol=absolute,
                equal_nan=True,
                msg=lambda text, seed=seed: f"{name}, seed {seed}: {text}",
            )
        if name == "attention":
            assert not actual[0].isnan().any(), f"seed {seed}: garbage beyond a context leaked in"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_int8_of_others_is_multiplied_as_it_is(
    compiled: ctypes.CDLL, dtype: torch.dtype, threads: int
) -> None:
    relative, absolute = TOLERANCE[dtype]
    backend = CpuBackend(compiled, threads, dtype)
    for seed in SEEDS:
        case = Shapes(seed, dtype).quantized_rows()
        (expected, _), (actual, _) = outcome(Reference(), case), outcome(backend, case)
        torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("inputs", [16, 48, 576, 1024, 1536])
def test_int8_products_are_near_the_plain_ones(inputs: int) -> None:
    """With channels a hundred times as large as the others too, as models have them."""
    draw = Shapes(inputs, torch.float32)
    x, weight = draw.normal(40, inputs), draw.normal(96, inputs)
    for outliers in ([], [3], [inputs - 1, inputs // 2]):
        x[:, outliers] *= 100
        exact = Reference().pack(weight).times(x)
        error = Reference("int8").pack(weight).times(x) - exact
        assert error.norm() < 0.02 * exact.norm(), outliers


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_int8_does_not_hide_what_is_no_number(compiled: ctypes.CDLL, number: float) -> None:
    x = torch.ones(2, 48)
    x[1, 40] = number

    def build(backend: Backend) -> Model:
        packed = backend.table(x), backend.pack(torch.ones(3, 48))
        return lambda ops: ops.linear(ops.embed(packed[0]), packed[1])

    case = Shapes(0, torch.float32).plain(build, 2)
    for backend in (CpuBackend(compiled, 1, torch.float32, "int8"), Reference("int8")):
        result, _ = outcome(backend, case)
        assert result[0].isfinite().all() and not result[1].isfinite().any()


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["linear", "gated", "rms_norm", "adapted_linear", "adapted_gated"])
def test_a_row_does_not_depend_on_its_neighbours(
    compiled: ctypes.CDLL, name: str, dtype: torch.dtype, quantization: Quantization
) -> None:
    """Bit by bit, alone and in the batch."""
    backend = CpuBackend(compiled, 2, dtype, quantization)
    for seed in SEEDS:
        build, batch, *rest = getattr(Shapes(seed, dtype), name)()
        forward = backend.compile(build(backend))
        together = forward(batch, *rest).clone()
        for row in range(0, len(batch.tokens), 7):
            own = None if batch.adapters is None else batch.adapters[row : row + 1]
            alone = batch_of(1, [0])
            alone.tokens[0], alone = row, replace(alone, adapters=own)
            assert torch.equal(forward(alone, *rest)[0], together[row]), f"seed {seed}, row {row}"


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADAPTED)
def test_who_wants_no_adapter_is_not_touched_by_those_of_others(
    compiled: ctypes.CDLL, name: str, dtype: torch.dtype, quantization: Quantization
) -> None:
    backend = CpuBackend(compiled, 2, dtype, quantization)
    for seed in SEEDS:
        case = getattr(Shapes(seed, dtype), name)()
        wanted = case.batch.adapters[case.batch.sample_indices]
        wanted = wanted if name == "adapted_samples" else case.batch.adapters
        free = replace(case.batch, adapters=torch.full_like(case.batch.adapters, NO_ADAPTER))
        plain, _ = outcome(backend, case._replace(batch=free))
        mixed, _ = outcome(backend, case)
        assert torch.equal(mixed[wanted == NO_ADAPTER], plain[wanted == NO_ADAPTER]), seed


def test_threads_that_come_late_change_nothing(compiled: ctypes.CDLL) -> None:
    """Many short turns by more threads than cores: a helper is often one or more turns behind."""
    backend = CpuBackend(compiled, 6, torch.float32)
    build, batch, *rest = Shapes(4, torch.float32).linear()
    forward = backend.compile(build(backend))
    wanted = forward(batch, *rest).clone()
    for _ in range(3000):
        assert torch.equal(forward(batch, *rest), wanted)


def test_a_nan_in_the_context_is_not_hidden(compiled: ctypes.CDLL) -> None:
    backend = CpuBackend(compiled, 1, torch.float32)
    heads = Heads(1, 1, 16)
    packed = backend.pack(torch.ones(1, 48))
    forward = backend.compile(lambda ops: ops.attention(ops.embed(packed), heads, 0, None, EPSILON))
    batch = batch_of(
        1,
        [],
        slots=torch.tensor([19]),
        block_tables=torch.tensor([[0, 1]], dtype=torch.int32),
        context_lengths=torch.tensor([20], dtype=torch.int32),
    )
    for place in (0, 1):  # a key, a value
        pool = torch.ones(2, 1, 2, 1, BLOCK_TOKENS, 16)
        pool[1, 0, place, 0, 1] = torch.nan
        assert forward(batch, torch.ones(1, 8), torch.zeros(1, 8), pool).isnan().any()


def test_few_buffers_serve_a_deep_model(compiled: ctypes.CDLL) -> None:
    backend = CpuBackend(compiled, 1, torch.float32)
    packed, weight = backend.pack(torch.eye(16)), torch.ones(16)

    def model(ops: Any) -> Any:
        x = ops.embed(packed)
        for _ in range(50):
            x = ops.rms_norm(ops.linear(x, packed), weight, EPSILON)
        return x

    forward: Any = backend.compile(model)
    assert len(forward._slots) <= 3


# --- Building -------------------------------------------------------------------------------------


def test_a_build_is_kept_and_found_again(tmp_path: Path, compiled: ctypes.CDLL) -> None:
    cpu.load(tmp_path)
    built = list(tmp_path.iterdir())
    assert len(built) == 1 and built[0].suffix == ".so"
    before = built[0].stat().st_mtime_ns
    cpu.load(tmp_path)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]


def test_without_a_compiler_the_reason_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cpu.BuildError, match="no C\\+\\+ compiler"):
        cpu.load(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text(
        "#!/bin/sh\ncase $1 in --version) exit 0;; esac\necho 'no way' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(cpu.BuildError, match="no way"):
        cpu.load(tmp_path / "cache")


def test_a_failed_build_is_loud_and_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu.kernels.__wrapped__() is None
    assert "SLOW" in caplog.text


def test_what_is_built_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    built = cpu.load(tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu.load(tmp_path / "cache")._name == built._name


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ("avx avx2 fma f16c bmi1 bmi2", "portable"),
        (" ".join(LEVELS[3].features), "avx2"),
        (" ".join(LEVELS[3].features | {"avx512f"}), "avx2"),
        (" ".join(LEVELS[2].features), "avx512"),
        (" ".join(LEVELS[1].features), "avx512-vnni"),
        (" ".join(LEVELS[0].features), "avx512-bf16"),
        ("", "portable"),
    ],
)
def test_a_cpu_gets_the_best_it_can_run(
    features: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(
        "slipstream.kernels.build.cpu_features", lambda: frozenset(features.split())
    )
    assert chosen_level().name == name


def test_a_level_that_this_cpu_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.kernels.build.cpu_features", lambda: LEVELS[1].features)
    monkeypatch.setenv(VARIABLE, "avx512-bf16")
    with pytest.raises(cpu.BuildError, match=r"has no avx512_bf16$"):
        chosen_level()
    monkeypatch.setenv(VARIABLE, "avx1024")
    with pytest.raises(cpu.BuildError, match="'avx1024'; it can be 0, triton, avx512-bf16"):
        chosen_level()


def test_kernels_can_be_switched_off() -> None:
    script = "from slipstream.kernels import cpu; assert cpu.kernels() is None; print('off')"
    environment = {**os.environ, VARIABLE: "0", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "off"
