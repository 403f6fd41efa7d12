"""`slipstream doctor transports`: one screen, for people and for programs."""

import json
import os
import sys
from pathlib import Path

import pytest

from slipstream.cli import doctor
from slipstream.cli.commands import TransportsConfig
from slipstream.cli.doctor import transports
from slipstream.cli.main import main
from slipstream.kv.probe import Row


@pytest.fixture(autouse=True)
def child_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def test_everything_is_measured_between_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--json", "--mib", "4", "--block-kib", "64", "--shm-dir", str(tmp_path)]
    assert main(["doctor", "transports", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memcpy"] > 0
    rows = {row["name"]: row for row in report["transports"]}
    assert set(rows) == {"shm", "nixl", "bus", "cuda_ipc"}
    for name in ("shm", "nixl", "bus"):
        assert rows[name]["verified"] > 0 and rows[name]["bare"] > 0 and not rows[name]["reason"]
    assert rows["cuda_ipc"]["reason"] == "the pool is in host memory"
    assert not list(tmp_path.iterdir())


def test_the_screen_says_what_is_fastest_and_what_is_missing_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [Row("shm", 8.0, 9.0), Row("bus", 2.0, 2.5), Row("nixl", reason="not installed: pip")]
    monkeypatch.setattr(doctor, "measure_all", lambda *_: (10.0, rows))
    lines = transports(TransportsConfig()).splitlines()
    assert "364 blocks of 360 KiB" in lines[0] and "memcpy (10.0 GB/s)" in lines[0]
    shm, bus, nixl = lines[4:7]
    assert shm.split()[:5] == ["shm", "8.0", "(80%)", "9.0", "(90%)"]
    assert shm.endswith("<- taken here") and bus.endswith("anywhere")
    assert nixl == "nixl       no: not installed: pip"


@pytest.mark.parametrize(("nixl", "note"), [(11.0, "not 1.2 times as fast as shm"), (13.0, "here")])
def test_what_is_little_faster_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, nixl: float, note: str
) -> None:
    rows = [Row("shm", 10.0, 11.0), Row("nixl", nixl, nixl)]
    monkeypatch.setattr(doctor, "measure_all", lambda *_: (20.0, rows))
    lines = transports(TransportsConfig()).splitlines()
    assert lines[5].endswith(note) and lines[4].endswith("here") == ("not" in note)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["transport"], "did you mean transports"),
        (["transports", "--block-kib", "2048", "--mib", "1"], "--block-kib 2048 is more than"),
        (["transports", "--shm-dir", "/nowhere"], "--shm-dir /nowhere: No such file"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) in (2, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
