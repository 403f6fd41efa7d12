"""Which steps become graphs, and that padding changes nothing: with recordings in the place of
CUDA's graphs, which compute anew what was captured from the memory that it was captured with."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slipstream.kernels.drawn import EPSILON, batch_of
from slipstream.kernels.gpu.backend import TritonBackend
from slipstream.kernels.gpu.graphs import Graphs, Inputs, Replay
from slipstream.kernels.gpu.language import INTERPRETED
from slipstream.kernels.ops import NO_SLOT, ForwardBatch, Heads

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HEADS, VOCAB, BLOCKS = Heads(4, 2, 16), 23, 12
WIDTH = HEADS.query * HEADS.dim


class Captured:
    """Recordings, by the sizes of what they yield."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        result = run()
        self.sizes.append(len(result))

        def replay() -> Tensor:
            self.replays += 1
            return result.copy_(run())

        return replay


def model_on(backend: TritonBackend) -> Callable[[object], Tensor]:
    torch.manual_seed(0)
    table = backend.table(torch.randn(VOCAB, WIDTH, device=DEVICE))
    sizes = (HEADS.query + 2 * HEADS.kv) * HEADS.dim, WIDTH
    qkv = backend.pack(torch.randn(sizes, device=DEVICE) / 8)
    weight = torch.rand(WIDTH, device=DEVICE)

    def model(ops: object) -> Tensor:
        stream = ops.embed(table)  # type: ignore[attr-defined]
        x = ops.linear(ops.rms_norm(stream, weight, EPSILON), qkv)  # type: ignore[attr-defined]
        delta = ops.attention(x, HEADS, 0, None, EPSILON)  # type: ignore[attr-defined]
        x = ops.rms_norm(ops.take(delta), weight, EPSILON, ops.take(stream))  # type: ignore[attr-defined]
        return ops.linear(x, table, wide=True)  # type: ignore[attr-defined, no-any-return]

    return model


def decode_step(contexts: list[int], seed: int = 0) -> tuple[ForwardBatch, Tensor, Tensor]:
    """Blocks are told apart by row; angles are any."""
    some = torch.Generator().manual_seed(seed)
    rows = len(contexts)
    tables = torch.randperm(BLOCKS, generator=some).int()[: 2 * rows].view(rows, 2)
    at = torch.tensor(contexts) - 1
    batch = batch_of(
        rows,
        list(range(rows)),
        DEVICE,
        slots=tables[torch.arange(rows), at // 16] * 16 + at % 16,
        block_tables=tables,
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        context_lengths=torch.tensor(contexts, dtype=torch.int32),
    )
    angles = torch.randn(rows, HEADS.dim // 2, generator=some).to(DEVICE)
    return batch, angles.cos(), angles.sin()


def pool_of(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(BLOCKS, 1, 2, HEADS.kv, 16, HEADS.dim, device=DEVICE)


@pytest.fixture
def forward() -> Callable[..., Tensor]:
    backend = TritonBackend(torch.float32, DEVICE)
    return backend.compile(model_on(backend))  # type: ignore[arg-type]


def test_a_padded_step_yields_what_the_step_alone_does(forward: Callable[..., Tensor]) -> None:
    graphs, pool = Graphs(forward, Captured(), max_blocks=3, sizes=(1, 2, 4)), pool_of()
    for seed, contexts in enumerate(([5], [17, 32], [1, 16, 31], [9, 9, 9, 20], [3, 2, 1])):
        step, alone = decode_step(contexts, seed), pool_of(seed)
        result = graphs.run(*step, pool.copy_(alone))
        assert result is not None and len(result) == len(contexts)
        torch.testing.assert_close(result, forward(*step, alone), rtol=1e-6, atol=1e-6)
        assert torch.equal(pool, alone)  # the padding wrote nothing


def test_a_size_is_captured_once_and_serves_all_that_fit(forward: Callable[..., Tensor]) -> None:
    captured, pool = Captured(), pool_of()
    graphs = Graphs(forward, captured, max_blocks=2, sizes=(1, 4))
    for contexts in ([7], [20], [3, 4], [3, 4, 5], [3, 4, 5, 32], [8]):
        assert graphs.run(*decode_step(contexts), pool) is not None
    assert captured.sizes == [1, 4] and captured.replays == 6
    graphs.run(*decode_step([7]), pool_of())  # another pool lies elsewhere
    assert captured.sizes == [1, 4, 1]


def test_what_no_graph_takes(forward: Callable[..., Tensor]) -> None:
    captured, pool = Captured(), pool_of()
    graphs = Graphs(forward, captured, max_blocks=2, sizes=(1, 2))
    step, *angles = decode_step([4, 4])
    longer = replace(step, block_tables=torch.zeros(2, 3, dtype=torch.int32))
    assert graphs.run(longer, *angles, pool) is None
    assert graphs.run(replace(step, sample_indices=step.sample_indices[:1]), *angles, pool) is None
    assert graphs.run(replace(step, tokens=torch.zeros(3).long()), *angles, pool) is None
    assert graphs.run(*decode_step([4, 4, 4]), pool) is None
    assert not captured.sizes


def test_preparing_captures_all_sizes_and_writes_nothing(forward: Callable[..., Tensor]) -> None:
    captured, pool = Captured(), pool_of()
    graphs = Graphs(forward, captured, max_blocks=2, sizes=(1, 2, 4, 8))
    graphs.prepare(pool, HEADS.dim // 2, rows=3)
    assert captured.sizes == [4, 2, 1]
    assert torch.equal(pool, pool_of())
    assert graphs.run(*decode_step([9, 10]), pool) is not None
    assert captured.sizes == [4, 2, 1]


def test_a_smaller_step_clears_what_a_larger_one_left() -> None:
    inputs = Inputs(4, 2, 8, DEVICE)
    inputs.fill(*decode_step([20, 21, 22, 23]), size=4)
    inputs.fill(*decode_step([5]), size=4)
    batch = inputs.first(4)
    assert batch.slots.tolist()[1:] == [NO_SLOT] * 3
    assert batch.context_lengths.tolist() == [5, 0, 0, 0]
