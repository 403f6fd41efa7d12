"""Standing back, as the kernel sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.runtime import priority

SCRIPT = """
import os, sys, threading
from slipstream.runtime.priority import stand_back
if "session" in sys.argv: os.setsid()
stand_back(int(sys.argv[1]))
def look(): print(os.getpriority(os.PRIO_PROCESS, 0), flush=True)
thread = threading.Thread(target=look)
thread.start(); thread.join()
sys.stdin.read()
"""
"""`0` is the thread that asks. It goes on until it is told, for us to look at its session."""


def autogroup(process: int) -> str | None:
    """The niceness of its session; None where the kernel shares the cores out in another way or
    does not show it (a sandbox, a control group)."""
    try:
        words = Path(f"/proc/{process}/autogroup").read_text(encoding="ascii").split()
    except OSError:
        return None
    return words[-1] if words else None


def after(*words: str) -> tuple[str, str | None]:
    """The niceness of a thread and of its session."""
    environment = {**os.environ, "PYTHONPATH": str(Path(priority.__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, *words]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        niceness = process.stdout.readline().strip()
        session = autogroup(process.pid)
        assert niceness, process.stderr.read()
        process.communicate("", timeout=30)
    return niceness, session


def test_threads_that_come_later_stand_back_too() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert after("0")[0] == str(own)
    assert after("7")[0] == str(min(19, own + 7))


def test_a_session_of_its_own_stands_back_as_one() -> None:
    ours = autogroup(os.getpid())
    if ours is None:
        pytest.skip("here the kernel does not share the cores out among sessions")
    assert after("7", "session")[1] == "7"
    assert after("7")[1] == ours, "ours stays"
