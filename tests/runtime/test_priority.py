"""Standing back, as the kernel sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, threading
from pathlib import Path
from slipstream.runtime.priority import stand_back
if "session" in sys.argv: os.setsid()
stand_back(int(sys.argv[1]))
seen = []
def look(): seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
thread = threading.Thread(target=look)
thread.start(); thread.join()
group = Path("/proc/self/autogroup")
print(seen[0], group.read_text().split()[-1] if group.exists() else "")
"""


def after(*words: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_threads_that_come_later_stand_back_too() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert after("0")[0] == str(own)
    assert after("7")[0] == str(min(19, own + 7))


def test_a_session_of_its_own_stands_back_as_one() -> None:
    if not Path("/proc/self/autogroup").exists():
        pytest.skip("this kernel does not group processes by session")
    assert after("7", "session")[1] == "7"
    assert after("7")[1] == Path("/proc/self/autogroup").read_text().split()[-1], "ours stays"
