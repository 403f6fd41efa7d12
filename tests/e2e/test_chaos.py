"""The faults that must never show, in a whole stack under load: the short form of `make chaos`."""

import asyncio
import json
from pathlib import Path

import pytest

from slipstream.loadtest.chaos.__main__ import stacks
from slipstream.loadtest.chaos.catalogue import SHORT
from slipstream.loadtest.chaos.run import run


def test_the_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = asyncio.run(run(stacks(set(SHORT)), seed=1, output=tmp_path))
    said = capsys.readouterr().out
    assert code == 0, said
    results = json.loads((tmp_path / "chaos.json").read_text())
    assert results.keys() == set(SHORT), said
    assert all(result["found"]["requests"] for result in results.values()), said
    table = (tmp_path / "chaos.md").read_text()
    assert table.count("| ok |") == len(SHORT)
