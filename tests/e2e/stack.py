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
from redis import Redis

from slipstream.core.prefix import HASH_BYTES
from slipstream.runtime.record import read
from slipstream.types import unpack_tokens

T = TypeVar("T")
PATIENCE_S = 120.0
"""Far more than anything needs; only a failing test waits so long."""
REPORTS_S = 2.5
"""Workers report twice a second, the scheduler tells the frontends once."""
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
        wait: bool = True,
        locate_timeout_s: float = 0.05,
        environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """`wait`: for READY; if not, `until_ready` is the test's to call. `environ`: what is added
        to ours; settings that `serve` has no flag for."""
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
        self._log = (self.base / "log").open("w")
        self._seen: set[psutil.Process] = set()
        self._expected: frozenset[str] = frozenset()
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slipstream.cli.main", "serve", *flags],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "SLIPSTREAM_LOCATE_TIMEOUT_S": str(locate_timeout_s),
                **(environ or {}),
            },
        )
        if wait:
            try:
                self.until_ready()
            except BaseException:
                self.kill()
                raise

    def until_ready(self) -> None:
        try:
            until(lambda: "\nREADY " in self.log or self.process.poll() is not None, "READY")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        assert self.process.poll() is None, self.log
        (self.run_dir,) = self.base.glob("slipstream-*")
        self._expected = frozenset(self.pids())

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

    def indexed(self, node_id: str) -> int:
        """Blocks of this worker that the index in the private Redis knows."""
        with Redis(unix_socket_path=str(self.run_dir / "redis.sock")) as redis:
            keys = list(redis.scan_iter(f"kvw:*:{node_id}"))
            return sum(len(name) == HASH_BYTES for key in keys for name in redis.hkeys(key))

    def segments(self) -> list[Path]:
        """Shared memory of this run."""
        return sorted(SHM.glob(f"slipstream-{self.run_dir.name}-*"))

    def kill_child(self, node_id: str) -> None:
        """SIGKILL to one process."""
        os.kill(self.pids()[node_id], signal.SIGKILL)

    def until_whole(self) -> None:
        """Every process lives, the cluster says that it is ready, and all blocks are free."""
        until(lambda: self.pids().keys() == self._expected, "all processes")
        until(self.serves, "ready")
        self.until_settled()

    def serves(self) -> bool:
        """Whether /readyz says so, and knows every service but the scheduler."""
        return self._expected <= self.epochs().keys() | {"serve", "redis", "scheduler-0"}

    def epochs(self) -> dict[str, int]:
        """Node id -> epoch of what the frontend knows about; nothing while it is not ready."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as reply:
                return {node["node_id"]: node["epoch"] for node in json.load(reply)["nodes"]}
        except OSError:
            return {}

    def gauges(self) -> dict[tuple[str, str], float]:
        """(node id, name) -> value of everything on the frontend's /metrics that has a node."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as reply:
            text = reply.read().decode()
        return {
            (sample.labels["node_id"], sample.name.removeprefix("slipstream_")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "node_id" in sample.labels
        }

    def worker(self, name: str) -> dict[str, float]:
        """Node id -> what each worker says of itself under this name."""
        wanted = f"worker_{name}"
        return {node: value for (node, name), value in self.gauges().items() if name == wanted}

    def unsettled(self) -> list[str]:
        """What is not as it must be at rest."""
        try:
            gauges = self.gauges()
        except OSError as error:
            return [str(error)]
        found = []
        for node in sorted(n for n in self._expected if n.startswith(("prefill-", "decode-"))):
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

    def until_settled(self) -> None:
        """Nothing runs and nothing is held, by numbers that are newer than this call."""
        since_s = time.monotonic()
        deadline_s = since_s + PATIENCE_S
        while time.monotonic() < since_s + REPORTS_S or not self._reported(since_s + 1.0):
            found = self.unsettled()
            if found:
                since_s = time.monotonic()
                assert since_s < deadline_s, f"{found}\n{self.log}"
            time.sleep(0.1)

    def _reported(self, since_s: float) -> bool:
        """Whether the scheduler has told its numbers since; the clock is the recordings'."""
        return any(
            now_s >= since_s and name == "Received" and fields["message"]["type"] == "ClusterLoad"
            for now_s, name, fields in self.story("frontend-0")
        )

    def answer_tokens(self, answer_id: str) -> list[int]:
        """Token ids of an answer that has ended, as the frontend's machine handed them to HTTP."""
        packed = [delta.get("tokens", b"") for delta in self._deltas(answer_id)]
        return unpack_tokens(b"".join(packed))

    def path(self, answer_id: str) -> str:
        """Workers of an answer that has ended: `prefill-0>decode-0`."""
        return str(self._deltas(answer_id)[-1]["path"])

    def _deltas(self, answer_id: str) -> list[dict[str, Any]]:
        if answer_id not in self._answers:
            told: dict[str, list[dict[str, Any]]] = {}
            for _, name, fields in self.story("frontend-0"):
                if name == "Deliver" and isinstance(fields["item"], dict):
                    told.setdefault(fields["request_id"].removesuffix("-0"), []).append(
                        fields["item"]
                    )
            self._answers = {key: all for key, all in told.items() if "finish_reason" in all[-1]}
        return self._answers[answer_id]

    def close(self, by: signal.Signals = signal.SIGTERM) -> None:
        """A signal; then nothing of it may be left."""
        try:
            self.pids()
            self.process.send_signal(by)
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
