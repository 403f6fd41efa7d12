"""Where a step's milliseconds go, and what the machine allows: one table for each kind of step.

    python -m slipstream.loadtest.steps [--model demo] [--quantization int8] [--threads 2]

Decode steps of some rows at one context, and steps that compute a prompt. Each is repeated, and the
median taken, operation by operation. The floor of an operation is the longer of its bytes over the
machine's bandwidth and its arithmetic over the machine's rate, both measured first, with as many
threads. `around` is what the runner does before and behind the program: tables, sampling.
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch

from slipstream.core.machine import Admission, BatchPlan, Row
from slipstream.engine.decoder import Decoder
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.runner import Runner
from slipstream.kernels.ops import Quantization
from slipstream.kernels.program import Kind, Program, Rows
from slipstream.kv.layout import ELEMENT_BYTES, KvDtype
from slipstream.kv.segment import SegmentHeader, create_segment
from slipstream.loadtest.quality import prepared
from slipstream.types import BLOCK_TOKENS, SamplingParams

_PRODUCTS = (Kind.LINEAR, Kind.GATED)


@dataclass(frozen=True)
class Machine:
    bytes_per_s: float
    """Read from memory."""
    operations_per_s: float
    """Of matrix products: two for each multiplication."""


@dataclass(frozen=True)
class Shape:
    """Of a step."""

    rows: int
    tokens: int
    """Of each row."""
    context: int
    """Of each row, before the step."""


@dataclass
class Part:
    """Operations of one name, of one step."""

    ms: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0

    def floor_ms(self, machine: Machine) -> float:
        memory_s = self.bytes / machine.bytes_per_s
        return max(memory_s, self.operations / machine.operations_per_s) * 1e3


def best_s(work: Callable[[], object], times: int = 7) -> float:
    def once() -> float:
        begin_s = time.perf_counter()
        work()
        return time.perf_counter() - begin_s

    return min(once() for _ in range(times))


def measure_machine(dtype: KvDtype, quantization: Quantization) -> Machine:
    memory = torch.ones(1 << 27)
    size = 2048
    if quantization == "int8":
        left, right = (torch.ones(size, size, dtype=torch.int8) for _ in range(2))
        product_s = best_s(lambda: torch._int_mm(left, right))
    else:
        wide = torch.ones(size, size, dtype=getattr(torch, dtype))
        product_s = best_s(lambda: wide @ wide)
    return Machine(memory.nbytes / best_s(memory.sum), 2 * size**3 / product_s)


class Steps:
    """A model, and steps of it, timed."""

    def __init__(
        self, folder: Any, dtype: KvDtype, threads: int, quantization: Quantization, tokens: int
    ):
        """`tokens`: room for so many in the pool, over all rows."""
        self.config = ModelConfig.read(folder)
        self.runner = Runner(folder, dtype, self._pool(dtype, tokens), threads, quantization)
        self.number = 0

    def _pool(self, dtype: KvDtype, tokens: int) -> torch.Tensor:
        """In shared memory, as workers have it: in huge pages where the kernel gives some."""
        layout = self.config.kv_layout(dtype)
        header = SegmentHeader(
            kv_layout_id=layout.layout_id("steps"),
            epoch=1,
            num_blocks=tokens // BLOCK_TOKENS + 1,
            block_bytes=layout.block_bytes,
        )
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            segment = create_segment(Path(folder) / "steps.kv", header)
            segment.close()  # the memory goes with its last mapping
        pool = torch.frombuffer(segment.blocks, dtype=getattr(torch, dtype))
        return pool.view(header.num_blocks, *layout.block_shape)

    @property
    def program(self) -> Program:
        decoder = self.runner.decoder
        assert isinstance(decoder, Decoder), "not the native decoder"
        assert isinstance(decoder.program, Program), "no compiled kernels here"
        return decoder.program

    def run(self, shape: Shape, times: int) -> dict[str, Part]:
        """The medians; `around` is what the runner does besides the program."""
        program = self.program
        program.clock_ns = (ctypes.c_int64 * (len(program.ops) + 1))()
        rows = self.rows(shape)
        samples: list[list[float]] = []
        for _ in range(times + 2):
            begin_ns = time.monotonic_ns()
            self.step(rows)
            end_ns = time.monotonic_ns()
            clock_ns = list(program.clock_ns)
            gaps = [after - before for before, after in pairwise(clock_ns)]
            samples.append([*gaps, (clock_ns[0] - begin_ns) + (end_ns - clock_ns[-1])])
        program.clock_ns = None
        medians = [statistics.median(each) / 1e6 for each in zip(*samples[2:], strict=True)]
        return self._parts(medians, shape)

    def _parts(self, medians: Sequence[float], shape: Shape) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for fields, ms in zip(self.program.ops, medians[:-1], strict=True):
            part = parts.setdefault(self._name(fields), Part())
            part.ms += ms
            part.bytes += self._bytes(fields, shape)
            part.operations += self._operations(fields, shape)
        parts["around"] = Part(ms=medians[-1])
        return parts

    def rows(self, shape: Shape) -> tuple[Row, ...]:
        length = shape.context + shape.tokens
        table = -(-length // BLOCK_TOKENS)
        return tuple(
            Row(
                f"row-{number}",
                1,
                tuple(index % self.config.vocab_size for index in range(300, 300 + shape.tokens)),
                shape.context,
                tuple(range(number * table, (number + 1) * table)),
                True,
            )
            for number in range(shape.rows)
        )

    def step(self, rows: Sequence[Row], adapters: Sequence[str] = ("",)) -> None:
        """`adapters`: rows have them by turns."""
        self.number += 1
        greedy = SamplingParams(max_tokens=1, seed=1, temperature=0)
        admitted = tuple(
            Admission(row.request_id, 1, (1,), 1, greedy, adapter)
            for row, adapter in zip(rows, cycle(adapters), strict=False)
        )
        self.runner.run(BatchPlan(step=self.number, rows=tuple(rows), admitted=admitted))

    def _name(self, fields: dict[str, Any]) -> str:
        kind = Kind(fields["kind"])
        if kind not in _PRODUCTS:
            return kind.name.lower()
        if kind is Kind.GATED:
            return "gate and up"
        last = fields is self.program.ops[-1]
        return "vocabulary" if last else f"linear {fields['inputs']}x{fields['outputs']}"

    def _bytes(self, fields: dict[str, Any], shape: Shape) -> float:
        kind, size = Kind(fields["kind"]), ELEMENT_BYTES[self.runner.layout.dtype]
        if kind in _PRODUCTS:
            outputs = fields["outputs"] * (2 if kind is Kind.GATED else 1)
            weight_bytes = 1 if fields["quantized"] else size
            return float(outputs * fields["inputs"] * weight_bytes)
        if kind is Kind.ATTEND:
            tokens = shape.rows * (shape.context + shape.tokens)
            return float(2 * tokens * fields["kv_heads"] * fields["head_dim"] * size)
        return 0.0

    def _operations(self, fields: dict[str, Any], shape: Shape) -> float:
        kind = Kind(fields["kind"])
        tokens = shape.rows * (1 if fields["rows"] == Rows.SAMPLES else shape.tokens)
        if kind in _PRODUCTS:
            outputs = fields["outputs"] * (2 if kind is Kind.GATED else 1)
            return float(2 * tokens * outputs * fields["inputs"])
        if kind is Kind.ATTEND:
            seen = shape.tokens * shape.context + shape.tokens * (shape.tokens + 1) / 2
            return float(4 * shape.rows * seen * fields["heads"] * fields["head_dim"])
        return 0.0


def table(title: str, parts: dict[str, Part], machine: Machine) -> str:
    total = Part(
        sum(part.ms for part in parts.values()),
        sum(part.bytes for part in parts.values()),
        sum(part.operations for part in parts.values()),
    )
    floors = {name: part.floor_ms(machine) for name, part in parts.items()}
    lines = [f"### {title}", "", "| part | ms | % | MB | GFLOP | floor, ms |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    ordered = sorted(parts.items(), key=lambda item: -item[1].ms)
    for name, part, floor_ms in (
        *((name, part, floors[name]) for name, part in ordered),
        ("all", total, sum(floors.values())),
    ):
        numbers = f"{part.ms:.2f} | {100 * part.ms / total.ms:.0f} | {part.bytes / 1e6:.1f}"
        lines.append(f"| {name} | {numbers} | {part.operations / 1e9:.2f} | {floor_ms:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="as for slipstream serve")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", default="1,8,32", help="of decode steps")
    parser.add_argument("--context", type=int, default=288, help="of decode steps")
    parser.add_argument("--prompts", default="256,1024", help="tokens, in one step")
    parser.add_argument("--times", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = measure_machine(options.dtype, options.quantization)
    print(
        f"{options.threads} threads: {machine.bytes_per_s / 1e9:.1f} GB/s read, "
        f"{machine.operations_per_s / 1e9:.0f} GFLOP/s in products\n"
    )
    decodes = [Shape(int(rows), 1, options.context) for rows in options.rows.split(",")]
    prompts = [Shape(1, int(tokens), 0) for tokens in options.prompts.split(",")]
    room = max(
        shape.rows * (shape.context + shape.tokens + BLOCK_TOKENS) for shape in decodes + prompts
    )
    how = options.dtype, options.threads, options.quantization
    steps = Steps(prepared(options.model), *how, room)
    for shape in decodes:
        title = f"decode, {shape.rows} rows, context {shape.context}"
        print(table(title, steps.run(shape, options.times), machine), end="\n\n", flush=True)
    for shape in prompts:
        title = f"prompt of {shape.tokens} tokens"
        print(
            table(title, steps.run(shape, max(3, options.times // 4)), machine),
            end="\n\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
