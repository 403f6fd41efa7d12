"""Starts toy processes, looks into their recordings and pages, and ends them."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from slipstream.runtime.record import read

T = TypeVar("T")
PATIENCE_S = 60.0
"""Far more than anything needs; only a failing test waits so long."""
PEER = Path(__file__).with_name("peer.py")


def until(condition: Callable[[], T], what: str) -> T:
    """Waits for something true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Peer:
    """One process, and what it left behind."""

    def __init__(self, cluster: "Cluster", kind: str, config: dict[str, Any]) -> None:
        self.kind, self.config = kind, config
        self.records = cluster.folder / "records"
        self._known = set(self.records.glob("*.rec"))
        self._errors = (cluster.folder / f"{config['node_id']}-{len(cluster.peers)}.err").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), kind, json.dumps(config)],
            stderr=self._errors,
            stdout=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def end(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    @property
    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def story(self) -> list[tuple[str, dict[str, Any]]]:
        """What its machine was told and answered, in order, so far."""
        pattern = f"{self.config['node_id']}-*.rec"
        files = sorted(set(self.records.glob(pattern)) - self._known)
        return [(name, fields) for _, name, fields in read(files[0])] if files else []

    def saw(self, name: str, **fields: Any) -> int:
        """How many events or effects of that name, with these fields, are in the story."""
        return sum(
            name == found and fields.items() <= contents.items() for found, contents in self.story()
        )

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page; status 0 while nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.config["metrics_port"], timeout=9)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"slipstream_{name}{{"):
                return float(line.split()[-1])
        return -1.0


class Cluster:
    """Peers over one kind of transport, in one short folder."""

    def __init__(self, folder: Path, scheme: str = "ipc") -> None:
        self.folder, self.scheme = folder, scheme
        self.peers: list[Peer] = []
        self._addresses: dict[str, str] = {}

    def address(self, node_id: str) -> str:
        if node_id not in self._addresses:
            place = f"{self.folder}/{node_id}.sock"
            if self.scheme == "tcp":
                place = f"127.0.0.1:{free_port()}"
            self._addresses[node_id] = f"{self.scheme}://{place}"
        return self._addresses[node_id]

    def start(self, kind: str, node_id: str, **settings: Any) -> Peer:
        config = {
            "node_id": node_id,
            "listen": self.address(node_id),
            "advertise": self.address(node_id),
            "scheduler": self.address("scheduler"),
            "run_dir": str(self.folder),
            "record": str(self.folder / "records"),
            **settings,
        }
        peer = Peer(self, kind, config)
        self.peers.append(peer)
        return peer

    def echo(self, **settings: Any) -> Peer:
        return self.start("echo", "scheduler", **settings)

    def asker(self, node_id: str = "asker-0", **settings: Any) -> Peer:
        return self.start("asker", node_id, **settings)

    def close(self) -> None:
        for peer in self.peers:
            if peer.process.poll() is None:
                peer.process.kill()
            peer.process.wait()
            peer._errors.close()
