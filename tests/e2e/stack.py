"""A real stack, started by `slipstream serve` as a user would, and looked at from outside."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from slipstream.runtime.record import read

T = TypeVar("T")
PATIENCE_S = 120.0
"""Far more than anything needs; only a failing test waits so long."""
SHM = Path("/dev/shm")
_NODE_ID = re.compile(r"--node-id (\S+)")


def until(condition: Callable[[], T], what: str) -> T:
    """Waits for something true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """Float32 and a small pool, unless the settings say otherwise: `Stack(decode=2)`."""

    def __init__(self, **settings: Any) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        self.records = self.base / "records"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        wanted = {
            "port": self.port,
            "run_dir": self.base,
            "record": self.records,
            "dtype": "float32",
            "threads": 1,
            "max_model_len": 2048,
            "kv_cache_bytes": "128MiB",
            **settings,
        }
        flags = [word for k, v in wanted.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        self._log = (self.base / "log").open("w")
        self._seen: set[psutil.Process] = set()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slipstream.cli.main", "serve", *flags],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        try:
            until(lambda: "\nREADY " in self.log or self.process.poll() is not None, "READY")
            assert self.process.poll() is None, self.log
            (self.run_dir,) = self.base.glob("slipstream-*")
            self.pids()
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        """All that serve and its children have printed."""
        return (self.base / "log").read_text(encoding="utf-8")

    def pids(self) -> dict[str, int]:
        """Node id -> pid of what lives at this moment; `redis` and `serve` among them."""
        serve = psutil.Process(self.process.pid)
        found = {"serve": serve.pid}
        for child in serve.children():
            try:
                command = " ".join(child.cmdline())
            except psutil.Error:  # it has just ended
                continue
            if match := _NODE_ID.search(command):
                found[match[1]] = child.pid
            elif "redis-server" in command:
                found["redis"] = child.pid
            self._seen.add(child)
        return found

    def story(self, node_id: str) -> list[tuple[float, str, dict[str, Any]]]:
        """(s, class, fields) of all that the lives of a node were told and answered, in order."""
        files = sorted(self.records.glob(f"{node_id}-*.rec"))
        return [entry for file in files for entry in read(file)]

    def segments(self) -> list[Path]:
        """Shared memory of this run."""
        return sorted(SHM.glob(f"slipstream-{self.run_dir.name}-*"))

    def close(self) -> None:
        """SIGTERM; then nothing of it may be left."""
        try:
            self.pids()
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(PATIENCE_S) == 0, self.log
            left = [process for process in self._seen if process.is_running()]
            assert not left, left
            assert not self.segments()
            assert not self.run_dir.exists()
            assert "Traceback" not in self.log, self.log
        finally:
            self.kill()

    def kill(self) -> None:
        """Whatever a failed test has left goes too: children die with their parent."""
        self.process.kill()
        self.process.wait()
        self._log.close()
        shutil.rmtree(self.base, ignore_errors=True)
        for segment in SHM.glob("slipstream-*"):
            if hasattr(self, "run_dir") and self.run_dir.name in segment.name:
                segment.unlink(missing_ok=True)
