"""A real stack, started by `slipstream serve` as a user would, and looked at from outside."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
from prometheus_client.parser import text_string_to_metric_families

from slipstream.runtime.record import read

T = TypeVar("T")
PATIENCE_S = 120.0
"""Far more than anything needs; only what fails waits so long."""
SHM = Path("/dev/shm")
INJECTED = Path(__file__).parent / "injected"
_NODE_ID = re.compile(r"--node-id (\S+)")
_RELEASED_S = 5.0


def until(condition: Callable[[], T], what: str) -> T:
    """Waits for something true. AssertionError: it does not come."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"in vain: {what}")
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ports_in_a_row(count: int) -> int:
    """The first of so many that are free at this moment."""
    while True:
        probes = [socket.socket() for _ in range(count)]
        try:
            probes[0].bind(("127.0.0.1", 0))
            first = int(probes[0].getsockname()[1])
            if first + count < 65535:
                for offset, probe in enumerate(probes[1:], 1):
                    probe.bind(("127.0.0.1", first + offset))
                return first
        except OSError:
            pass
        finally:
            for probe in probes:
                probe.close()


class Stack:
    """Float32, a small pool and a transfer for every prompt, unless the settings say otherwise:
    `Stack(decode=2)`."""

    def __init__(
        self,
        variables: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        injected: bool = False,
        **settings: Any,
    ) -> None:
        """`variables`: settings that `serve` has no flag for, beside `environ`, which is our own if
        it is None. `injected`: workers have faults on call (`injected/sitecustomize.py`)."""
        self.base = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        self.records = self.base / "records"
        self.port = int(settings.get("port", 0)) or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        wanted = {
            "run_dir": self.base,
            "record": self.records,
            "dtype": "float32",
            "threads": 2,
            "max_model_len": 2048,
            "kv_cache_bytes": "128MiB",
            "disaggregation": "always",
            "ttft_target_s": 0,  # none: nothing is refused because this machine is slow
            **settings,
            "port": self.port,
        }
        flags = [word for k, v in wanted.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        path = [str(INJECTED)] * injected + [place for place in sys.path if place]
        added = {"PYTHONPATH": os.pathsep.join(path), **(variables or {})}
        self.command = ["env", *(f"{name}={value}" for name, value in added.items())]
        self.command += [sys.executable, "-m", "slipstream.cli.main", "serve", *flags]
        self._environ = environ
        self._log = (self.base / "log").open("w")
        self._seen: set[psutil.Process] = set()
        self.expected: frozenset[str] = frozenset()
        """Node ids of the whole stack, `serve` and `redis` among them; known once it is ready."""
        self.start()

    def start(self) -> None:
        """Once by itself; again after a kill."""
        self._ready_lines = self.log.count("\nREADY ")
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environ,
        )

    def until_ready(self) -> None:
        def ready() -> bool:
            return self.log.count("\nREADY ") > self._ready_lines or self.process.poll() is not None

        try:
            until(ready, "READY")
            assert self.process.poll() is None
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        (self.run_dir,) = self.base.glob("slipstream-*")
        self.expected = frozenset(self.pids())

    @property
    def log(self) -> str:
        """All that serve and its children have printed."""
        return (self.base / "log").read_text(encoding="utf-8")

    @property
    def workers(self) -> list[str]:
        return sorted(name for name in self.expected if name.startswith(("prefill-", "decode-")))

    def processes(self) -> dict[str, psutil.Process]:
        """Node id -> what lives at this moment; `redis` and `serve` among them."""
        serve = psutil.Process(self.process.pid)
        found = {"serve": serve}
        for child in serve.children():
            try:
                command = " ".join(child.cmdline())
            except psutil.Error:  # it has just ended
                continue
            if match := _NODE_ID.search(command):
                found[match[1]] = child
            elif "redis-server" in command:
                found["redis"] = child
            self._seen.add(child)
        return found

    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.processes().items()}

    def send(self, node_id: str, number: signal.Signals) -> None:
        os.kill(self.pids()[node_id], number)

    def kill_child(self, node_id: str) -> None:
        """SIGKILL to one process."""
        self.send(node_id, signal.SIGKILL)

    def story(self, node_id: str) -> list[tuple[float, str, dict[str, Any]]]:
        """(s, class, fields) of all that the lives of a node were told and answered, in order."""
        files = sorted(self.records.glob(f"{node_id}-*.rec"))
        return [entry for file in files for entry in read(file)]

    def segments(self) -> list[Path]:
        """Shared memory of this run."""
        return sorted(SHM.glob(f"slipstream-{self.run_dir.name}-*"))

    def serves(self) -> bool:
        """Whether /readyz says so, and knows every service but the scheduler."""
        return self.expected <= self.epochs().keys() | {"serve", "redis", "scheduler-0"}

    def epochs(self) -> dict[str, int]:
        """Node id -> epoch of what the frontend knows about; nothing while it is not ready."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as reply:
                return {node["node_id"]: node["epoch"] for node in json.load(reply)["nodes"]}
        except OSError:
            return {}

    def gauges(self, port: int = 0) -> dict[tuple[str, str], float]:
        """(node id, name) -> value of everything on a /metrics that has a node: the first
        frontend's, or that of who listens on `port`."""
        url = f"http://127.0.0.1:{port}" if port else self.url
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as reply:
            text = reply.read().decode()
        return {
            (sample.labels["node_id"], sample.name.removeprefix("slipstream_")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "node_id" in sample.labels
        }

    def unsettled(self, gauges: Mapping[tuple[str, str], float]) -> list[str]:
        """What is not as it must be at rest."""
        found = []
        for node in self.workers:
            of = {name: v for (owner, name), v in gauges.items() if owner == node}
            if not of:
                found.append(f"{node} is silent")
                continue
            if of["worker_blocks_used"] != of["worker_blocks_cached"]:
                found.append(
                    f"{node}: {of['worker_blocks_used']:g} blocks used, "
                    f"{of['worker_blocks_cached']:g} cached"
                )
            zero = ("blocks_leased", "blocks_quarantined", "running", "waiting")
            found += [f"{node}: {name}" for name in zero if of[f"worker_{name}"]]
        for (node, name), value in gauges.items():
            state = name.startswith("scheduler_requests_") and not name.endswith("_total")
            if value and (state or name in ("requests_live", "requests_unclosed", "codec_calls")):
                found.append(f"{node}: {name} {value:g}")
        return found

    def close(self, by: signal.Signals = signal.SIGTERM, tracebacks: bool = False) -> None:
        """A signal; then nothing of it may be left, nor a traceback in its log unless there may be
        some. AssertionError: something is."""
        try:
            self.pids()
            self.process.send_signal(by)
            assert self.process.wait(PATIENCE_S) == 0, self.log
            left = [process for process in self._seen if process.is_running()]
            assert not left, left
            assert not self.segments()
            assert not self.run_dir.exists()
            assert tracebacks or "Traceback" not in self.log, self.log
        finally:
            self.kill()

    def kill(self) -> None:
        """Whatever has been left goes too: children die with their parent."""
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(self._seen, timeout=_RELEASED_S)
        self._log.close()
        shutil.rmtree(self.base, ignore_errors=True)
        for segment in SHM.glob("slipstream-*"):
            if hasattr(self, "run_dir") and self.run_dir.name in segment.name:
                segment.unlink(missing_ok=True)
