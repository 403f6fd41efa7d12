"""The compiled kernels against the reference, over shapes that people do not think of."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slipstream.kernels import cpu, ops, reference

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 1.6e-2)}
SEEDS = range(25)
BLOCK_TOKENS = 16

Case = tuple[tuple[object, ...], dict[str, object]]


@pytest.fixture(scope="session")
def compiled() -> cpu.CpuKernels:
    kernels = cpu.kernels()
    if kernels is None:
        pytest.skip("no C++ compiler here")
    return kernels


class Draw:
    """Random arguments of one operation from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def strided(self, tokens: int, heads: int, dim: int) -> Tensor:
        """Heads from the middle of a wider row, as the packed projection leaves them."""
        before, after = self.random.choice([(0, 0), (1, 2), (3, 0)])
        return self.normal(tokens, before + heads + after, dim)[:, before : before + heads]

    def heads(self) -> tuple[int, int, int]:
        """Heads, KV heads, head_dim."""
        kv_heads = self.random.choice([1, 2, 3, 5, 8])
        group = self.random.choice([1, 2, 3, 7, 40])
        return kv_heads * group, kv_heads, self.random.choice([16, 24, 64, 80, 96, 128, 256])

    def rms_norm(self) -> Case:
        tokens, dim = self.random.choice([1, 2, 33]), self.random.choice([16, 40, 64, 576, 1024])
        if self.random.random() < 0.3:
            return (self.strided(tokens, 3, dim), self.normal(dim), 1e-5), {}
        x = self.normal(tokens, dim)
        residual = self.normal(tokens, dim) if self.random.random() < 0.5 else None
        return (x, self.normal(dim), 1e-6), {"residual": residual}

    def silu_and_mul(self) -> Case:
        tokens, dim = self.random.choice([1, 2, 65]), self.random.choice([16, 24, 96, 1536])
        return (10 * self.normal(tokens, 2 * dim),), {}

    def rotary(self) -> Case:
        heads, _, dim = self.heads()
        tokens = self.random.choice([1, 2, 65])
        angles = 7 * torch.randn(tokens, dim // 2, generator=self.generator)
        return (self.strided(tokens, heads, dim), angles.cos(), angles.sin()), {}

    def write_kv(self) -> Case:
        _, kv_heads, dim = self.heads()
        tokens = self.random.choice([1, 2, 65])
        pool = self.normal(9, 3, 2, kv_heads, BLOCK_TOKENS, dim)
        slots = torch.randperm(9 * BLOCK_TOKENS, generator=self.generator)[:tokens]
        key, value = (self.strided(tokens, kv_heads, dim) for _ in range(2))
        return (key, value, pool, self.random.randrange(3), slots), {}

    def paged_attention(self) -> Case:
        heads, kv_heads, dim = self.heads()
        rows = self.random.choice([1, 2, 5])
        contexts = [self.random.choice([1, 2, 15, 16, 17, 63, 64, 65, 150]) for _ in range(rows)]
        counts = [
            self.random.choice([1, 1, 2, context, max(1, context // 2)]) for context in contexts
        ]
        counts = [min(count, context) for count, context in zip(counts, contexts, strict=True)]
        width = max(-(-context // BLOCK_TOKENS) for context in contexts) + self.random.choice(
            [0, 2]
        )
        tables = torch.randperm(rows * width, generator=self.generator).int().view(rows, width)
        pool = self.normal(rows * width, 2, 2, kv_heads, BLOCK_TOKENS, dim)
        for row, context in enumerate(contexts):  # what is beyond a context may be anything
            for index in range(context, width * BLOCK_TOKENS):
                pool[tables[row, index // BLOCK_TOKENS], :, :, :, index % BLOCK_TOKENS] = torch.nan
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        query = self.strided(sum(counts), heads, dim)
        lengths = torch.tensor(contexts, dtype=torch.int32)
        return (query, pool, self.random.randrange(2), tables, starts, lengths, dim**-0.5), {}


def copy_of(case: Case) -> Case:
    """A deep copy that keeps the strides."""

    def twin(value: object) -> object:
        if not isinstance(value, Tensor) or value._base is None:
            return value.clone() if isinstance(value, Tensor) else value
        base = value._base.clone()
        return base.as_strided(value.shape, value.stride(), value.storage_offset())

    return tuple(map(twin, case[0])), {key: twin(value) for key, value in case[1].items()}


def outcome(function: Callable[..., Tensor | None], case: Case) -> list[Tensor]:
    """Everything that the call may have changed, and its result."""
    result = function(*case[0], **case[1])
    tensors = [value for value in (*case[0], *case[1].values()) if isinstance(value, Tensor)]
    return tensors if result is None else [result, *tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ops.OPS)
def test_compiled_kernels_agree_with_the_reference(
    compiled: cpu.CpuKernels, name: str, dtype: torch.dtype
) -> None:
    relative, absolute = TOLERANCE[dtype]
    for seed in SEEDS:
        case = getattr(Draw(seed, dtype), name)()
        expected = outcome(getattr(reference, name), copy_of(case))
        actual = outcome(getattr(compiled, name), copy_of(case))
        for one, other in zip(expected, actual, strict=True):
            torch.testing.assert_close(
                other,
                one,
                rtol=relative,
                atol=absolute,
                equal_nan=True,
                msg=lambda text, seed=seed: f"{name}, seed {seed}: {text}",
            )
        if name == "paged_attention":
            assert not actual[0].isnan().any(), f"seed {seed}: garbage beyond a context leaked in"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_attention_does_not_depend_on_chunks_or_neighbours(
    compiled: cpu.CpuKernels, dtype: torch.dtype
) -> None:
    """Bit by bit: a whole prompt, the same prompt token by token, and two of them in one batch."""
    draw = Draw(7, dtype)
    context, heads, kv_heads, dim = 150, 6, 2, 64
    pool = draw.normal(24, 1, 2, kv_heads, BLOCK_TOKENS, dim)
    tables = torch.randperm(24, generator=draw.generator).int()[:20].view(2, 10)
    query = draw.normal(2 * context, heads, dim)

    def attend(rows: list[tuple[int, int, int]]) -> Tensor:
        """Rows of (request, first query, end)."""
        tokens = torch.cat([query[r * context :][first:end] for r, first, end in rows])
        starts = torch.tensor([0, *(end - first for _, first, end in rows)]).cumsum(0).int()
        lengths = torch.tensor([end for _, _, end in rows]).int()
        table = tables[torch.tensor([r for r, _, _ in rows])].contiguous()
        return compiled.paged_attention(tokens, pool, 0, table, starts, lengths, dim**-0.5)

    whole = attend([(0, 0, context)])
    single = torch.cat([attend([(0, i, i + 1)]) for i in range(context)])
    mixed = attend([(1, 90, 150), (0, 0, 37), (0, 37, context), (1, 3, 4)])
    assert torch.equal(whole, single)
    assert torch.equal(whole, mixed[60 : 60 + context])


def test_a_nan_in_the_context_is_not_hidden(compiled: cpu.CpuKernels) -> None:
    for place in (0, 1):  # a key, a value
        pool = torch.ones(2, 1, 2, 1, BLOCK_TOKENS, 16)
        pool[1, 0, place, 0, 3] = torch.nan
        out = compiled.paged_attention(
            torch.ones(1, 1, 16),
            pool,
            0,
            torch.tensor([[0, 1]], dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([20], dtype=torch.int32),
            0.25,
        )
        assert out.isnan().any()


# --- Building -------------------------------------------------------------------------------------


def test_a_build_is_kept_and_found_again(tmp_path: Path, compiled: cpu.CpuKernels) -> None:
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
    monkeypatch.delenv("SLIPSTREAM_CPU_KERNELS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu.kernels.__wrapped__() is None
    assert "SLOW" in caplog.text


def test_kernels_can_be_switched_off() -> None:
    script = (
        "import torch; from slipstream.kernels import cpu, ops; assert cpu.kernels() is None;"
        "print(ops.silu_and_mul(torch.zeros(1, 32)).shape)"
    )
    environment = {**os.environ, "SLIPSTREAM_CPU_KERNELS": "0", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "torch.Size([1, 16])"
