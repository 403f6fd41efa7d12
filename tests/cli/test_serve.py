"""`slipstream serve` around fake children: READY, restarts, start-up errors, a clean end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cli.fakes import write_model

FAKE = Path(__file__).with_name("fake_serve.py")
WAIT_S = 20.0


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


class Run:
    """One fake cluster in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        self.shm = folder / "shm"
        self.base = folder / "r"
        self.shm.mkdir()
        self.model = write_model(folder / "toy")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    def start(self, *flags: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(FAKE), str(self.model), "--port", str(self.port)),
                *("--run-dir", str(self.base), "--shm-dir", str(self.shm), *flags),
            ],
            env={**os.environ, "FAKE_JOURNAL": str(self.folder)},
            stdout=(self.folder / "out").open("w"),
            stderr=(self.folder / "err").open("w"),
            text=True,
        )
        return self.process

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def ready(self) -> None:
        eventually(lambda: "READY" in self.out and "curl" in self.out)

    def lives(self, word: str, node_id: str) -> list[int]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        found = [line.split() for line in lines]
        return [int(pid) for kind, name, pid in found if kind == word and name == node_id]

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=WAIT_S)


@pytest.fixture
def run(short_path: Path) -> Iterator[Run]:
    cluster = Run(short_path)
    yield cluster
    if cluster.process is not None and cluster.process.poll() is None:
        cluster.process.kill()
        cluster.process.wait()


def test_ready_block_says_what_runs(run: Run) -> None:
    run.start("--decode", "2")
    run.ready()
    assert run.out.startswith(f"READY  http://127.0.0.1:{run.port}  in ")
    for name in ("scheduler-0", "kvindex-0", "tokenizer-0", "frontend-0", "prefill-0", "decode-1"):
        assert re.search(rf"{name} pid \d+", run.out), name
    assert "decode-0: 10 = 160 tokens, 10KiB" in run.out
    assert "context 128 tokens, int8 weights)" in run.out
    assert "curl -N http://127.0.0.1" in run.out and '"model": "toy"' in run.out
    assert "decode-0     decode-0 says hello" in run.err
    assert "\x1b" not in run.out + run.err
    command = re.search(r"Redis +(\S+redis-cli -s \S+)", run.out)
    assert command is not None
    answer = subprocess.run(
        [*command[1].split(), "ping"], capture_output=True, text=True, check=False
    )
    assert answer.stdout == "PONG\n"


def test_sigterm_drains_in_order_and_leaves_nothing(run: Run) -> None:
    process = run.start()
    run.ready()
    (run_dir,) = run.base.iterdir()
    assert run_dir.stat().st_mode & 0o777 == 0o700
    (run.shm / f"slipstream-{run_dir.name}-decode-0-1").write_bytes(b"x")
    (run.shm / "slipstream-of-another-run").write_bytes(b"x")
    children = run.children()
    assert len(children) == 7
    process.send_signal(signal.SIGTERM)
    assert run.wait() == 0
    order = [line.split()[1] for line in run.journal.read_text().splitlines() if "term" in line]
    assert order[0] == "frontend-0" and len(order) == 6
    assert not [child for child in children if child.is_running()]
    assert not list(run.base.iterdir())
    assert [path.name for path in run.shm.iterdir()] == ["slipstream-of-another-run"]


def test_second_signal_does_not_wait(run: Run) -> None:
    (run.folder / "deaf-frontend-0").touch()
    process = run.start()
    run.ready()
    process.send_signal(signal.SIGINT)
    eventually(lambda: len(run.lives("term", "frontend-0")) == 1)
    process.send_signal(signal.SIGINT)  # an echo, as through make: does not count
    time.sleep(1.1)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert run.wait() == 0
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("node_id", ["decode-0", "frontend-0", "scheduler-0"])
def test_killed_child_is_started_again(run: Run, node_id: str) -> None:
    run.start()
    run.ready()
    (first,) = run.lives("start", node_id)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(run.lives("start", node_id)) == 2)
    assert f"{node_id:<12} was killed by SIGKILL; starts again in 0.2 s" in run.err


def test_a_child_that_stands_still_is_killed_and_started_again(run: Run) -> None:
    (run.folder / "beat-decode-0").touch()
    run.start("--watchdog-s", "2")
    run.ready()
    stopped, silent = run.lives("start", "decode-0"), run.lives("start", "scheduler-0")
    time.sleep(1.5)
    os.kill(stopped[0], signal.SIGSTOP)
    eventually(lambda: len(run.lives("start", "decode-0")) == 2)
    assert "decode-0     has given no sign of life for 2 s; killed" in run.err
    assert run.lives("start", "scheduler-0") == silent, "it never promised to speak"


def test_who_was_stopped_itself_does_not_blame_its_children(run: Run) -> None:
    (run.folder / "beat-decode-0").touch()
    process = run.start("--watchdog-s", "2")
    run.ready()
    time.sleep(1.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    process.send_signal(signal.SIGCONT)
    time.sleep(4.0)
    assert len(run.lives("start", "decode-0")) == 1, run.err


def test_killed_redis_is_started_again(run: Run) -> None:
    run.start()
    run.ready()

    def redis() -> list[int]:
        return [child.pid for child in run.children() if "redis" in child.name()]

    (first,) = redis()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: bool(redis()) and redis() != [first])


def test_start_up_error_is_the_last_line_and_the_exit_code(run: Run) -> None:
    (run.folder / "fail-decode-0").touch()
    run.start()
    assert run.wait() == 4
    assert run.err.splitlines()[-1] == "slipstream decode: model.safetensors is damaged"
    assert "READY" not in run.out
    assert not list(run.base.iterdir())


def test_child_that_keeps_crashing_before_ready_ends_the_run(run: Run) -> None:
    (run.folder / "crash-decode-0").touch()
    (run.folder / "crash-frontend-0").touch()
    run.start()
    assert run.wait() == 1
    assert re.fullmatch(
        r"slipstream serve: (decode|frontend)-0 ended with exit code 1 5 times in a row: .*",
        run.err.splitlines()[-1],
    )


def test_killed_supervisor_leaves_no_process_and_the_next_one_sweeps(run: Run) -> None:
    process = run.start()
    run.ready()
    children = run.children()
    (run_dir,) = run.base.iterdir()
    segment = run.shm / f"slipstream-{run_dir.name}-decode-0-1"
    segment.write_bytes(b"x")
    process.kill()
    process.wait()
    eventually(lambda: not [child for child in children if child.is_running()])
    assert run_dir.exists()
    run.journal.unlink()
    run.start()
    run.ready()
    assert not run_dir.exists() and not segment.exists()


def test_second_start_names_who_has_the_port(run: Run, short_path: Path) -> None:
    process = run.start()
    run.ready()
    (frontend,) = run.lives("start", "frontend-0")
    second = subprocess.run(
        [sys.executable, "-m", "slipstream.cli.main", "serve", "--port", str(run.port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert second.returncode == 5
    assert second.stderr.count("\n") == 1
    assert f"port {run.port} is taken by pid {frontend} (" in second.stderr
    assert process.poll() is None


def test_not_ready_in_time(run: Run) -> None:
    run.start("--decode", "1", "--ready-timeout-s", "0.01")
    assert run.wait() == 1
    assert "not ready after 0.01 s: waiting" in run.err.splitlines()[-1]
