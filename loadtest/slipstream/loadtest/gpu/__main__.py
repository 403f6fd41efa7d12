"""What a GPU does, in one command: kernels checked, then floors, attention, steps, sampling, CUDA
IPC and the whole stack timed, beside Transformers on the same card.

    python -m slipstream.loadtest.gpu --output docs/benchmarks/gpu-h200

Ends within ten minutes. Each phase is a process of its own with a time budget: one that fails or
hangs costs its own numbers alone. `--output`.json and .md are written after each.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import msgspec

from slipstream.loadtest.gpu.results import Phase, Results, Row
from slipstream.loadtest.gpu.shapes import EIGHT_B, THIRTY_TWO_B

SHAPES = {shape.name: shape for shape in (EIGHT_B, THIRTY_TWO_B)}
TOTAL_S = 570.0
MARK = "ROW "
HERE = "slipstream.loadtest.gpu"

Tell = Callable[[Row], None]


class Planned(NamedTuple):
    """A phase: `function(folder, floors, tell)` of a module."""

    name: str
    what: str
    where: str
    """`module:function`"""
    budget_s: float


PHASES = (
    Planned("floors", "What the card allows", f"{HERE}.floors:measure", 40),
    Planned("kernels", "Kernels against their references", f"{HERE}.floors:check", 100),
    Planned("attention", "Decode attention", f"{HERE}.steps:attention", 50),
    Planned("decode", "A decode step", f"{HERE}.steps:decode", 90),
    Planned("prefill", "Prompts", f"{HERE}.steps:prefill", 50),
    Planned("sampling", "Sampling", f"{HERE}.steps:sampling", 30),
    Planned("ipc", "CUDA IPC between two processes", f"{HERE}.moves:measure", 50),
    Planned("stack", "The whole stack", f"{HERE}.stack:ours", 120),
    Planned(
        "peer", "Transformers, continuous batching, the same card", f"{HERE}.stack:theirs", 100
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="without a suffix")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8B")
    parser.add_argument("--phases", help="some of them, with commas between", default="")
    parser.add_argument("--total-s", type=float, default=TOTAL_S)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--floors", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.only:
        return _run_one(options.only, options.folder, json.loads(options.floors))
    machine = machine_of()
    if machine is None:
        print("no GPU that torch can use: nothing to measure here", file=sys.stderr)
        return 3
    chosen = options.phases.split(",") if options.phases else [each.name for each in PHASES]
    planned = [each for each in PHASES if each.name in chosen]
    results = Results({**machine, "shape": options.shape})
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[options.shape].write(Path(folder))
        run_all(planned, results, Path(folder), options.output, options.total_s)
    print(results.page())
    return 0


def machine_of() -> dict[str, str] | None:
    """In a process of its own, so that this one keeps nothing on the card. None: there is none."""
    program = (
        "import json, torch; p = torch.cuda.get_device_properties(0); "
        "print(json.dumps({'card': p.name, 'memory': f'{p.total_memory / 2**30:.0f} GiB', "
        "'multiprocessors': str(p.multi_processor_count), 'CUDA': torch.version.cuda}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    if ran.returncode:
        return None
    found: dict[str, str] = json.loads(ran.stdout)
    return {**found, "Python": platform.python_version(), **_versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def run_all(
    planned: Sequence[Planned], results: Results, folder: Path, output: Path, total_s: float
) -> None:
    """In order; a phase has no more than its budget and what is left of `total_s`."""
    end_s = time.monotonic() + total_s
    floors: dict[str, float] = {}
    for each in planned:
        phase = Phase(each.name, each.what)
        results.phases.append(phase)
        budget_s = min(each.budget_s, end_s - time.monotonic())
        if budget_s > 1:
            run_phase(each, phase, folder, floors, budget_s)
        else:
            phase.note = "no time was left"
        if each.name in ("floors", "stack"):
            floors |= {row.name: row.value for row in phase.rows}
        results.save(output)


def run_phase(
    planned: Planned, phase: Phase, folder: Path, floors: dict[str, float], budget_s: float
) -> None:
    """Rows that were told before its end count, whatever that is."""
    command = [sys.executable, "-m", HERE, "--only"]
    command += [planned.where, "--folder", str(folder), "--floors", json.dumps(floors)]
    began_s = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
        try:
            process.wait(budget_s)
            phase.state = "failed" if process.returncode else "done"
        except subprocess.TimeoutExpired:
            phase.state, phase.note = "late", f"ended after its {budget_s:.0f} s"
        finally:
            process.terminate()  # it ends what it has started
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        out.seek(0)
        lines = [line.removeprefix(MARK) for line in out if line.startswith(MARK)]
        phase.rows = [msgspec.json.decode(line, type=Row) for line in lines]
        if phase.state == "failed":
            err.seek(0)
            phase.note = " ".join(err.read().split())[-300:]
    phase.seconds = time.monotonic() - began_s


def _run_one(where: str, folder: Path, floors: dict[str, float]) -> int:
    module, _, function = where.partition(":")
    measure = getattr(importlib.import_module(module), function)

    def tell(row: Row) -> None:
        print(f"{MARK}{msgspec.json.encode(row).decode()}", flush=True)

    measure(folder, floors, tell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
