"""Decode steps as graphs: captured once for each of a few sizes, launched by one call.

A decode step of hundreds of small kernels is bound by what launching each takes, unless the card
launches them itself. A graph's addresses and sizes are fixed: a step's inputs are copied into
buffers that stay where they are, and rows are added until one of the sizes is full. What is in a
graph does not look at the context's length, so one serves all.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slipstream.kernels.ops import NO_SLOT, Forward, ForwardBatch

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of the graphs; larger steps are launched one kernel at a time, which they hide."""
Replay: TypeAlias = Callable[[], Tensor]
Capture: TypeAlias = Callable[[Callable[[], Tensor]], Replay]
"""Of what computes, out of fixed memory into fixed memory: the same, as one launch."""


class Inputs:
    """Where graphs find a decode step: one token a row, all of which sample."""

    def __init__(self, rows: int, max_blocks: int, half_dim: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.cosine = zeros(rows, half_dim, dtype=torch.float32)
        self.sine = zeros(rows, half_dim, dtype=torch.float32)
        self._batch = ForwardBatch(
            tokens=zeros(rows, dtype=torch.int64),
            positions=zeros(rows, dtype=torch.int64),
            slots=torch.full((rows,), NO_SLOT, dtype=torch.int64, device=device),
            block_tables=zeros(rows, max_blocks, dtype=torch.int32),
            query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_lengths=zeros(rows, dtype=torch.int32),
            sample_indices=torch.arange(rows, device=device),
        )

    def first(self, rows: int) -> ForwardBatch:
        """Views of so many rows."""
        batch = self._batch
        return ForwardBatch(
            tokens=batch.tokens[:rows],
            positions=batch.positions[:rows],
            slots=batch.slots[:rows],
            block_tables=batch.block_tables[:rows],
            query_starts=batch.query_starts[: rows + 1],
            context_lengths=batch.context_lengths[:rows],
            sample_indices=batch.sample_indices[:rows],
        )

    def fill(self, step: ForwardBatch, cosine: Tensor, sine: Tensor, size: int) -> None:
        """The step's rows, then padding up to `size`, with tokens and tables that were there."""
        rows, width = step.block_tables.shape
        into = self._batch
        into.tokens[:rows].copy_(step.tokens)
        into.positions[:rows].copy_(step.positions)
        into.slots[:rows].copy_(step.slots)
        into.block_tables[:rows, :width].copy_(step.block_tables)
        into.context_lengths[:rows].copy_(step.context_lengths)
        self.cosine[:rows].copy_(cosine)
        self.sine[:rows].copy_(sine)
        self.clear(rows, size)

    def clear(self, first: int, end: int) -> None:
        if first < end:
            self._batch.slots[first:end].fill_(NO_SLOT)
            self._batch.context_lengths[first:end].zero_()


class Graphs:
    """Graphs of one model, captured at `prepare` or when a size is first met."""

    def __init__(
        self, forward: Forward, capture: Capture, max_blocks: int, sizes: Sequence[int] = SIZES
    ) -> None:
        """`max_blocks`: of the longest table; steps with a longer one are not taken."""
        self._forward, self._capture, self._max_blocks = forward, capture, max_blocks
        self._sizes = tuple(sorted(sizes))
        self._inputs: Inputs | None = None
        self._place: tuple[object, ...] = ()
        self._replays: dict[int, Replay] = {}

    def prepare(self, pool: Tensor, half_dim: int, rows: int) -> None:
        """All sizes that steps of up to `rows` need; nothing is written to the pool.

        The largest first: the others find room in its memory.
        """
        inputs = self._inputs_for(pool, half_dim)
        wanted = self.size_of(rows) or self._sizes[-1]
        for size in reversed([size for size in self._sizes if size <= wanted]):
            inputs.clear(0, size)
            self._replay(size, inputs, pool)

    def size_of(self, rows: int) -> int | None:
        """Rows of the graph that takes so many; None if none does."""
        return next((size for size in self._sizes if size >= rows), None)

    def run(self, step: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> Tensor | None:
        """The step's result, overwritten by the next; None if it is none for a graph: one with
        adapters, too, which is rarer than who would capture all sizes again."""
        rows, width = step.block_tables.shape
        size = self.size_of(rows)
        if len(step.tokens) != rows or len(step.sample_indices) != rows or size is None:
            return None
        if width > self._max_blocks or step.adapters is not None:
            return None
        inputs = self._inputs_for(pool, cosine.shape[1])
        inputs.fill(step, cosine, sine, size)
        return self._replay(size, inputs, pool)()[:rows]

    def _inputs_for(self, pool: Tensor, half_dim: int) -> Inputs:
        place = pool.data_ptr(), pool.shape, pool.dtype, half_dim
        if self._inputs is None or self._place != place:
            self._replays.clear()
            self._place = place
            self._inputs = Inputs(self._sizes[-1], self._max_blocks, half_dim, pool.device)
        return self._inputs

    def _replay(self, size: int, inputs: Inputs, pool: Tensor) -> Replay:
        if size not in self._replays:
            step, angles = inputs.first(size), (inputs.cosine[:size], inputs.sine[:size])
            self._replays[size] = self._capture(lambda: self._forward(step, *angles, pool))
        return self._replays[size]


class CudaCapture:
    """CUDA graphs that share their memory: the result of one lives until the next is launched."""

    def __init__(self) -> None:
        self._memory: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        here: Any = torch.cuda.current_stream()
        beside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            run()  # kernels are compiled and libraries have their handles before they are recorded
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy blocks meanwhile; only this one's calls are bound by the capture.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = run()
        self._memory = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
