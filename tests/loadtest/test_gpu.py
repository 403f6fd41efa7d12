"""What the measuring script does without a card: shapes and floors, phases and their ends, pages;
and its steps, on a CPU."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import msgspec
import pytest
import torch
from tokenizers import Tokenizer

from slipstream.core.machine import Row as StepRow
from slipstream.engine.model_config import ModelConfig
from slipstream.loadtest.gpu import __main__ as command
from slipstream.loadtest.gpu import floors as measured
from slipstream.loadtest.gpu import steps
from slipstream.loadtest.gpu.results import Phase, Results, Row, rate_row, time_row
from slipstream.loadtest.gpu.shapes import EIGHT_B, Shape

TINY = Shape("tiny", 64, 96, 2, 4, 2, 16, 1000)


def test_the_floors_of_a_known_shape() -> None:
    """Llama 3.1 8B, by its model card and its files: 8.03 G parameters, 128 KiB of KV a token."""
    assert EIGHT_B.layer_weights + 2 * EIGHT_B.head_weights == pytest.approx(8.03e9, rel=1e-3)
    assert EIGHT_B.kv_token_bytes == 128 << 10
    weights = 2 * (EIGHT_B.layer_weights + EIGHT_B.head_weights)
    assert EIGHT_B.decode_bytes(64, 1024) == weights + 64 * 1024 * (128 << 10)
    matrices = 2 * (EIGHT_B.layer_weights * 2048 + EIGHT_B.head_weights)
    attention = 4 * 32 * 32 * 128 * (2048 * 2048 / 2)
    assert EIGHT_B.prompt_operations(2048) == matrices + attention


def test_a_shape_becomes_a_folder_that_can_be_served(tmp_path: Path) -> None:
    TINY.write(tmp_path)
    config = ModelConfig.read(tmp_path, dummy=True)
    assert steps.shape_of(config) == replace(TINY, name="")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(999)]
    assert all(texts), "each id has a text, so that each token is streamed"
    ids = tokenizer.encode("plain text").ids
    assert tokenizer.decode(ids) == "plain text"


def test_verdicts() -> None:
    met = time_row("a", 10.0, 8.0, 0.7)
    missed = rate_row("b", 50.0, "GB/s", 100.0, 0.8)
    assert (met.share, met.verdict) == (0.8, "met")
    assert (missed.share, missed.verdict) == (0.5, "missed: 80% wanted")
    phase = Phase("x", "X", "done", 1.0, "", [met, missed, Row("c", 3, "")])
    results = Results({"card": "none"}, [phase])
    results.phases.append(Phase("y", "Y", "late", 9.0, "ended after its 9 s"))
    page = results.page()
    assert "1 of 2 promises met." in page
    assert "- b: 50%, missed: 80% wanted" in page
    assert "- Y: late. ended after its 9 s" in page
    assert "| a | 10 ms | 8 | 80% | met |" in page and "| c | 3  |  |  |  |" in page


def test_each_phase_costs_its_own_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    names = {"good": "floors", "broken": "broken", "hangs": "hangs", "uses": "uses"}
    planned = [
        command.Planned(name, function, f"loadtest.gpu_phases:{function}", 4.0)
        for function, name in names.items()
    ]
    (tmp_path / "model").mkdir()
    results = Results({"card": "none"})
    began_s = time.monotonic()
    stem = tmp_path / "out" / "gpu"
    command.run_all(planned, results, tmp_path / "model", stem, 60.0)
    assert time.monotonic() - began_s < 60
    states = {phase.name: phase.state for phase in results.phases}
    assert states == {"floors": "done", "broken": "failed", "hangs": "late", "uses": "done"}
    saved = json.loads(stem.with_suffix(".json").read_text())
    rows = {phase["name"]: phase["rows"] for phase in saved["phases"]}
    for name in ("broken", "hangs"):
        assert [row["name"] for row in rows[name]] == ["before"]
    assert rows["uses"][0]["value"] == 70.0, "what the first phase measured is told the others"
    assert "an illegal address" in results.phases[1].note
    assert "0 of 1 promises met." in stem.with_suffix(".md").read_text()


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    results = Results({})
    planned = [command.Planned("x", "X", "nowhere:nothing", 50.0)]
    command.run_all(planned, results, tmp_path, tmp_path / "gpu", 0.5)
    assert (results.phases[0].state, results.phases[0].note) == ("late", "no time was left")


def test_budgets_fit_into_ten_minutes() -> None:
    assert command.TOTAL_S <= 590
    assert sum(each.budget_s for each in command.PHASES[:-1]) <= command.TOTAL_S
    for each in command.PHASES:
        module, _, function = each.where.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_kernels_are_checked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels' own walk, one seed after the other, until there is no time left."""

    class Checked(NamedTuple):
        kernel: str
        error: float
        ok: bool

    def check(device: torch.device, seeds: range) -> list[Checked]:
        (seed,) = seeds
        return [Checked("norm", 0.5, True), Checked("draw", math.inf if seed else 0.0, not seed)]

    module = SimpleNamespace(check=check)
    monkeypatch.setattr(measured.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(measured, "SEEDS_MAX", 2)
    told: list[Row] = []
    measured.check(tmp_path, {}, told.append)
    norm, draw = told
    assert (norm.verdict, norm.note) == ("met", "2 shapes, 0 wrong")
    assert (draw.verdict, draw.note) == ("missed: 100% wanted", "2 shapes, 1 wrong")
    assert msgspec.json.decode(msgspec.json.encode(draw), type=Row) == draw


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 3
    assert capsys.readouterr().err == "no GPU that torch can use: nothing to measure here\n"


def test_its_steps_are_those_of_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: every phase that computes yields its rows, and each step is what it says."""
    TINY.write(tmp_path)
    monkeypatch.setattr(steps, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(steps, "median_ms", lambda work, times=1: work() is not None and 1.0)
    monkeypatch.setattr(steps, "ATTENTION", ((2, 64), (1, 4096)))
    monkeypatch.setattr(steps, "DECODE", ((1, 40), (3, 40)))
    monkeypatch.setattr(steps, "PROMPTS", (32, 100))
    seen: list[tuple[StepRow, ...]] = []
    launch = steps.Runner.launch

    def spied(runner: steps.Runner, plan: object) -> object:
        seen.append(plan.rows)  # type: ignore[attr-defined]
        return launch(runner, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(steps.Runner, "launch", spied)
    floors = {steps.BANDWIDTH: 100.0, steps.MATRICES: 1.0}
    told: dict[str, list[Row]] = {}
    for phase in (steps.attention, steps.decode, steps.prefill, steps.sampling):
        tell: Callable[[Row], None] = told.setdefault(phase.__name__, []).append
        partial(phase, tmp_path, floors, tell)()
    assert [row.name for row in told["attention"]] == ["2 x 64 tokens", "1 x 4096 tokens"]
    assert [row.name for row in told["decode"]] == [f"{n} streams at 40 tokens" for n in (1, 3)]
    assert len(told["prefill"]) == 2 and len(told["sampling"]) == 15
    contexts = [rows[0].start for rows in seen if len(rows) == 3]
    assert contexts == list(range(39, 39 + steps.STEPS + steps.WARM_STEPS + 1))
    assert all(row.value > 0 for rows in told.values() for row in rows)
