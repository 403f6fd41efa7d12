"""What a step costs with LoRA adapters in it: decode steps with none, one, several in one batch.

    python -m slipstream.loadtest.lora [--model demo] [--rank 16] [--adapters 1,4] [--rows 8,32]

Random adapters of all matrices, written as PEFT writes them and loaded as a worker does. Rows have
them by turns, which is the worst order for who reads them. The kinds of steps take turns too, and
each is compared with the one of its turn that a runner without any adapter made. The floor of what
is added is the longer of its bytes over the machine's bandwidth and its arithmetic over its rate.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from slipstream.core.machine import Row
from slipstream.engine.lora import CONFIG, WEIGHTS
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.native_adapters import NativeAdapters
from slipstream.kernels.reference import Reference
from slipstream.loadtest.quality import prepared
from slipstream.loadtest.steps import Machine, Shape, Steps, measure_machine
from slipstream.types import BLOCK_TOKENS

PATTERN = "base_model.model.{}.lora_{}.weight"


class Kind(NamedTuple):
    """Of a step: who makes it, and the adapters of its rows."""

    label: str
    steps: Steps
    adapters: tuple[str, ...]


def modules_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of all that may be added to."""
    return NativeAdapters(ModelConfig.read(folder), Reference(), 1, 1).modules


def write_adapter(
    folder: Path, modules: dict[str, tuple[int, int]], rank: int, seed: int
) -> tuple[int, int]:
    """Its numbers, and the bytes of its file."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (outputs, inputs) in modules.items():
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        up = torch.randn(outputs, rank, generator=generator) / 100
        tensors[PATTERN.format(module, "A")] = down.bfloat16()
        tensors[PATTERN.format(module, "B")] = up.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return numbers, (folder / WEIGHTS).stat().st_size


def loaded(steps: Steps, folder: Path) -> tuple[str, float, float]:
    """Its id, seconds to read it and to put it in its place; the latter the streams wait for."""
    begin_s = time.perf_counter()
    read = steps.runner.adapters.read(folder.name, str(folder))
    assert read.adapter is not None, read.problem
    read_s = time.perf_counter()
    steps.runner.adapters.put(read.adapter.adapter_id)
    return read.adapter.adapter_id, read_s - begin_s, time.perf_counter() - read_s


def measured(kinds: list[Kind], rows: tuple[Row, ...], times: int) -> list[list[float]]:
    """Milliseconds of each kind, turn by turn."""
    turns: list[list[float]] = []
    for turn in range(times + 2):
        ms = []
        for kind in kinds:
            begin_s = time.perf_counter()
            kind.steps.step(rows, kind.adapters)
            ms.append((time.perf_counter() - begin_s) * 1e3)
        if turn >= 2:
            turns.append(ms)
    return [list(each) for each in zip(*turns, strict=True)]


def floor_ms(machine: Machine, numbers: int, rows: int, adapters: int, size: int) -> float:
    """Of what is added: all numbers of each adapter are read, and multiplied with by each row."""
    bytes_s = min(adapters, rows) * numbers * size / machine.bytes_per_s
    return max(bytes_s, 2 * rows * numbers / machine.operations_per_s) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="as for slipstream serve")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", default="1,4", help="of all rows of a step")
    parser.add_argument("--rows", default="8,32", help="of decode steps")
    parser.add_argument("--context", type=int, default=288)
    parser.add_argument("--times", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = measure_machine(options.dtype, options.quantization)
    print(
        f"{options.threads} threads: {machine.bytes_per_s / 1e9:.1f} GB/s read, "
        f"{machine.operations_per_s / 1e9:.0f} GFLOP/s in products\n"
    )
    counts = [int(count) for count in options.adapters.split(",")]
    shapes = [Shape(int(rows), 1, options.context) for rows in options.rows.split(",")]
    room = max(shape.rows * (shape.context + 1 + BLOCK_TOKENS) for shape in shapes)
    folder = Path(prepared(options.model))
    how = options.dtype, options.threads, options.quantization
    without, steps = Steps(folder, *how, room), Steps(folder, *how, room)
    modules, ids = modules_of(folder), []
    with tempfile.TemporaryDirectory() as place:
        for index in range(max(counts)):
            path = Path(place) / f"adapter-{index}"
            numbers, size = write_adapter(path, modules, options.rank, index)
            name, read_s, put_s = loaded(steps, path)
            ids.append(name)
            print(
                f"adapter {index}: rank {options.rank}, {numbers / 1e6:.1f} M numbers, "
                f"{size / 1e6:.1f} MB; read in {read_s * 1e3:.0f} ms, put in {put_s * 1e3:.1f} ms"
            )
    kinds = [
        Kind("no adapter in the worker", without, ("",)),
        Kind("none in the step", steps, ("",)),
    ]
    kinds += [Kind(f"{count} in the step", steps, tuple(ids[:count])) for count in counts]
    element = 2 if options.dtype == "bfloat16" else 4
    print("\n| rows | | ms | beside the first, ms | % | floor of that, ms |")
    print("|---:|---|---:|---:|---:|---:|")
    for shape in shapes:
        times = measured(kinds, steps.rows(shape), options.times)
        for kind, ms in zip(kinds, times, strict=True):
            more = statistics.median(b - a for a, b in zip(times[0], ms, strict=True))
            adapters = len([each for each in kind.adapters if each])
            least = floor_ms(machine, numbers, shape.rows, adapters, element) if adapters else 0.0
            print(
                f"| {shape.rows} | {kind.label} | {statistics.median(ms):.2f} | {more:+.2f} | "
                f"{100 * more / statistics.median(times[0]):+.1f} | {least:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
