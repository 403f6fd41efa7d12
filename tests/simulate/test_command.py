"""`slipstream simulate` as a user types it."""

import json
import sys
from importlib import resources
from pathlib import Path

import msgspec
import pytest

from slipstream.cli.main import main
from slipstream.simulate.hardware import load_hardware, presets

SMALL = ("simulate", "--synthetic", "30", "--workers", "2", "--jobs", "1")


def test_a_table_and_a_file_with_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main([*SMALL, "--rate-scale", "4,1", "--json", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    found = json.loads(out.read_text())
    assert [run["rate_scale"] for run in found["runs"]] == [1.0, 4.0]
    assert found["settings"]["workers"] == 2
    assert found["settings"]["hardware"] == msgspec.to_builtins(load_hardware("h200-8b"))
    for run in found["runs"]:
        assert run["completed"] == 30 and run["ttft_s"]["p50"] > 0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    assert main([*SMALL, "--rate-scale", "1,2", "--plot", str(out)]) == 0
    begins = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert out.read_bytes().startswith(begins)


def test_a_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{"timestamp": %d, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
    trace.write_text("".join(line % (3000 * n) for n in range(5)))
    out = tmp_path / "out.json"
    words = ("--trace", str(trace), "--workers", "1", "--requests", "3", "--json", str(out))
    assert main(["simulate", *words]) == 0
    assert json.loads(out.read_text())["settings"]["trace"] == "trace.jsonl"
    assert str(tmp_path) not in out.read_text()
    assert capsys.readouterr().err.startswith("3 requests, 1800 prompt tokens; 1 runs\n")
    trace.write_text(line % 0 + "{}\n")
    assert main(["simulate", "--trace", str(trace)]) == 3
    missing = f"{trace}:2: object missing required field `timestamp`\n"
    assert capsys.readouterr().err == f"slipstream simulate: --trace: {missing}"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ("", 2, "either --trace FILE or --synthetic N is needed"),
        ("--synthetic 5 --trace x", 2, "either --trace FILE or --synthetic N is needed"),
        ("--trace /no/such", 3, "--trace: /no/such: No such file or directory"),
        ("--synthetic 5 --policy best", 2, "--policy: expected some of cost, prefix, "),
        ("--synthetic 5 --rate-scale 1,x", 2, "--rate-scale: expected numbers > 0 and <= 1e6"),
        ("--synthetic 5 --rate-scale 0", 2, "--rate-scale: expected numbers > 0 and <= 1e6"),
        ("--synthetic 5 --prefill 16", 2, "--prefill 16 of --workers 16 leaves nobody to decode"),
        ("--synthetic 5 --disaggregation always", 2, "always needs --prefill 1 or more"),
        ("--synthetic 5 --step-model h100", 3, "no such file, and the presets are "),
        ("--synthetic 5 --plot x.gif", 2, "--plot: expected a name in .png, .svg, .pdf, got x.gif"),
        ("--synthetic 5 --json /no/such/x", 3, "--json: /no/such/x: its folder is not there"),
        ("--synthetic -1", 2, "--synthetic: expected an int >= 0, got -1"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: str, code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments.split()]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("slipstream simulate: ") and complaint in line


def test_a_plot_without_matplotlib_is_refused_before_the_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--plot", "x.png"]) == 3
    expected = "slipstream simulate: --plot needs matplotlib: pip install 'slipstream[simulate]'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("name", presets())
def test_a_file_of_our_own_is_read_as_a_preset(tmp_path: Path, name: str) -> None:
    hardware = load_hardware(name)
    as_json, as_toml = tmp_path / "mine.json", tmp_path / "mine.toml"
    as_json.write_bytes(msgspec.json.encode(hardware))
    preset = resources.files("slipstream.simulate") / "presets" / f"{name}.toml"
    as_toml.write_text(preset.read_text())
    assert load_hardware(str(as_json)) == load_hardware(str(as_toml)) == hardware


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"step": {}}, "missing required field `base_s`"),
        ({"vocab_size": 0}, ">= 4096 - at `$.vocab_size`"),
        ({"speed": 1}, "unknown field `speed`"),
        ({"base_s": -1.0}, "step.base_s = -1.0; it must be 0 or more"),
        ({"base_s": 0.0}, "step.base_s = 0; a step takes time, so it must be above 0"),
    ],
)
def test_a_broken_file_is_one_line(
    tmp_path: Path,
    change: dict[str, object],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = msgspec.to_builtins(load_hardware("h200-8b"))
    if "base_s" in change:
        document["step"] |= change
    else:
        document |= change
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document))
    assert main([*SMALL, "--step-model", str(path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slipstream simulate: --step-model: {path}: ") and complaint in line
