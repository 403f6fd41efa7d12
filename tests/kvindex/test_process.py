"""kvindex as a process: it starts without Redis, and ends when told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.errors import ExitCode


def start(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream.cli.main", "kvindex", "--run-dir", str(folder), *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("late", [False, True])
def test_it_starts_without_redis_and_ends_at_sigterm(tmp_path: Path, late: bool) -> None:
    process = start(tmp_path, "--redis-url", f"unix://{tmp_path}/nobody.sock")
    assert process.stderr is not None
    wanted = "Redis does not answer" if late else "listens at"
    for line in process.stderr:
        if wanted in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(60) == 0, rest
    assert "Traceback" not in rest
    process.stderr.close()


def test_a_malformed_url_is_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "--redis-url", "nonsense")
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(60) == ExitCode.USAGE
    assert "--redis-url" in said
    assert said.count("\n") == 1
    process.stderr.close()
