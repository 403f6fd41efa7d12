"""A loop that stands still ends its process; one that was merely stopped goes on."""

import signal
import subprocess
import sys
import time

from slipstream.errors import ExitCode

PROGRAM = """
import sys, time
from slipstream.runtime.pulse import Pulse
pulse = Pulse(float(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    pulse.beat()
    time.sleep(0.1)
def stands_still():
    time.sleep(float(sys.argv[3]))
stands_still()
"""


def start(watchdog_s: float, beats: int, still_s: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", PROGRAM, str(watchdog_s), str(beats), str(still_s)]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)


def test_a_loop_that_stands_still_is_shown_and_ended() -> None:
    process = start(2.0, beats=3, still_s=60.0)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == ExitCode.FAULT
    assert "in stands_still" in errors and "stood still for 2 s" in errors


def test_a_loop_that_beats_is_left_alone_and_so_is_one_without_a_watch() -> None:
    watched, unwatched = start(2.0, beats=40, still_s=0.0), start(0.0, beats=1, still_s=4.0)
    assert watched.wait(30) == 0 == unwatched.wait(30)


def test_a_process_that_was_stopped_as_a_whole_goes_on() -> None:
    process = start(2.0, beats=40, still_s=0.0)
    time.sleep(1.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 0
