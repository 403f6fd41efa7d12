"""Each promise has a test that fails if it is broken: in a copy it is, and the test fails."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from promises.breaks import BREAKS, Break
from slipstream.loadtest.chaos.promises import PROMISES

ROOT = Path(__file__).parents[2]
PARTS = (
    "shared",
    "kernels",
    "services",
    "loadtest",
    "tests",
    "docs",
    "pyproject.toml",
    "LICENSE",
    "README.md",
    "Makefile",
)
TESTS_OF = {promise.id: promise.tests for promise in PROMISES}
TIMEOUT_S = 500
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "200")


def test_each_promise_can_be_broken_as_said() -> None:
    assert list(dict.fromkeys(each.promise for each in BREAKS)) == list(TESTS_OF)
    for each in BREAKS:
        assert each.test in TESTS_OF[each.promise]
        assert (ROOT / each.file).read_text(encoding="utf-8").count(each.old) == 1, each


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("broken", BREAKS, ids=lambda each: f"{each.promise}: {each.mistake}")
def test_a_broken_promise_is_noticed(broken: Break, tmp_path: Path) -> None:
    for part in PARTS:
        source = ROOT / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / part)
    file = tmp_path / broken.file
    file.write_text(file.read_text(encoding="utf-8").replace(broken.old, broken.new), "utf-8")
    path = os.pathsep.join(str(tmp_path / part) for part in PARTS[:5])
    try:
        ran = subprocess.run(
            [*PYTEST, f"tests/{broken.test}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    finally:
        _end_all_of(tmp_path)
    # It has failed, and not only been kept from running.
    assert f"FAILED tests/{broken.test}" in ran.stdout, ran.stdout[-4000:] + ran.stderr[-2000:]


def _end_all_of(folder: Path) -> None:
    """What was broken may be what ends them."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in " ".join([*process.cmdline(), *process.environ().values()]):
                process.kill()
