"""A worker's prices from its own recordings: `slipstream serve --record FOLDER` writes them.

Every `RunBatch` with its `BatchDone` is one equation, every `PullBlocks` with its `PullDone`
another; least squares of relative errors, without prices below zero.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.config import SetupError
from slipstream.core.machine import BatchPlan
from slipstream.core.step_model import StepModel, sample_of
from slipstream.messages import StepSample, WorkerInfo
from slipstream.runtime.record import read
from slipstream.simulate.hardware import Hardware
from slipstream.types import BLOCK_TOKENS

WARM_UP_STEPS = 8
"""First steps of a worker that are left out: memory is touched for the first time."""
STEPS_MIN = 50
OUTLIERS_SHARE = 0.05
READ_LATENCY_S, READ_BYTES_PER_S = 1e-4, 1e10
"""Where no READ was recorded."""

Floats = NDArray[np.float64]


class Recorded(msgspec.Struct):
    """What the recordings of a folder say about its workers."""

    worker: WorkerInfo | None = None
    steps: list[StepSample] = []
    reads: list[tuple[int, float]] = []
    """Blocks, and seconds from the effect to the event."""


def recorded(folder: Path) -> Recorded:
    """SetupError: there is too little in it."""
    found = Recorded()
    for path in sorted(folder.glob("*.rec")):
        _collect(path, found)
    if found.worker is None or len(found.steps) < STEPS_MIN:
        raise SetupError(
            f"slipstream simulate fit: {folder}: {len(found.steps)} steps of workers are recorded; "
            f"at least {STEPS_MIN} are needed (slipstream serve --record {folder}, and requests of "
            "different lengths)"
        )
    return found


def _collect(path: Path, found: Recorded) -> None:
    plans: dict[int, BatchPlan] = {}
    pulls: dict[str, tuple[int, float]] = {}
    for now_s, name, fields in read(path):
        match name:
            case "Send" if fields["message"]["type"] == "Hello":
                found.worker = _worker(fields["message"]["node"]) or found.worker
            case "RunBatch":
                plan = msgspec.convert(fields["plan"], BatchPlan)
                plans[plan.step] = plan
            case "BatchDone":
                step = plans.pop(fields["step"], None)
                if step is not None and step.step > WARM_UP_STEPS:
                    found.steps.append(sample_of(step.rows, fields["elapsed_s"]))
            case "PullBlocks":
                pulls[fields["pull_id"]] = len(fields["source_blocks"]), now_s
            case "PullDone" if fields["pull_id"] in pulls:
                blocks, begin_s = pulls.pop(fields["pull_id"])
                if fields["error"] is None:
                    found.reads.append((blocks, now_s - begin_s))


def _worker(node: dict[str, Any]) -> WorkerInfo | None:
    said = node.get("worker")
    return None if said is None else msgspec.convert(said, WorkerInfo)


def fit(found: Recorded) -> tuple[Hardware, float]:
    """A worker's file, and the median relative error of its steps."""
    assert found.worker is not None
    step, error = fit_steps(found.steps)
    latency_s, bytes_per_s = READ_LATENCY_S, READ_BYTES_PER_S
    worker = found.worker
    if found.reads:
        blocks = np.array([[1.0, blocks] for blocks, _ in found.reads])
        latency_s, block_s = positive_fit(blocks, np.array([s for _, s in found.reads]))
        bytes_per_s = worker.block_bytes / max(block_s, 1e-12)
    hardware = Hardware(
        model=worker.model,
        kv_bytes_per_token=worker.block_bytes // BLOCK_TOKENS,
        kv_cache_tokens=worker.num_blocks * BLOCK_TOKENS,
        max_model_len=worker.max_model_len,
        vocab_size=worker.vocab_size,
        max_num_seqs=worker.max_num_seqs,
        prefill_budget_tokens=max(worker.prefill_budget_tokens, BLOCK_TOKENS),
        read_latency_s=float(latency_s),
        read_bytes_per_s=float(bytes_per_s),
        step=step,
    )
    return hardware, error


def fit_steps(steps: Sequence[StepSample]) -> tuple[StepModel, float]:
    """Prices of steps, and the median relative error with them."""
    work = np.array(
        [(1, s.prefill_tokens, s.prefill_pairs, s.decode_rows, s.decode_context) for s in steps],
        dtype=np.float64,
    )
    elapsed_s = np.array([step.elapsed_s for step in steps])
    prices = positive_fit(work, elapsed_s)
    error = float(np.median(np.abs(work @ prices / elapsed_s - 1)))
    return StepModel(*(float(price) for price in prices)), error


def positive_fit(work: Floats, elapsed_s: Floats) -> Floats:
    """Prices >= 0 that predict `elapsed_s` from `work` with the least squared relative error; what
    fits worst is left out once, for it was disturbed. A price that would be negative is 0."""
    prices = _positive(work, elapsed_s)
    errors = np.abs(work @ prices / elapsed_s - 1)
    kept = errors <= np.quantile(errors, 1 - OUTLIERS_SHARE)
    return _positive(work[kept], elapsed_s[kept])


def _positive(work: Floats, elapsed_s: Floats) -> Floats:
    scaled = work / elapsed_s[:, None]
    ones = np.ones(len(scaled))
    active = list(range(work.shape[1]))
    prices = np.zeros(work.shape[1])
    while active:
        sizes = np.maximum(np.abs(scaled[:, active]).max(axis=0), 1e-300)
        found = np.linalg.lstsq(scaled[:, active] / sizes, ones, rcond=None)[0] / sizes
        if (found >= 0).all():
            prices[active] = found
            break
        del active[int(np.argmin(found * sizes))]
    return prices


def as_toml(hardware: Hardware, comment: str) -> str:
    """A file for `--step-model`."""
    lines = [f"# {comment}"]
    fields = msgspec.to_builtins(hardware)
    step = fields.pop("step")
    for name, value in fields.items():
        lines.append(f"{name} = {_literal(value)}")
    lines += ["", "[step]", *(f"{name} = {_literal(value)}" for name, value in step.items())]
    return "\n".join(lines) + "\n"


def _literal(value: str | int | float) -> str:
    return f"{value:.3e}" if isinstance(value, float) else msgspec.json.encode(value).decode()
