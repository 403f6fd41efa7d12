"""A real Prometheus reads a real stack, and every question of the dashboard has an answer."""

import asyncio
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.client import Client
from e2e.stack import Stack, free_port, until
from e2e.test_metrics import FOLDER, panels, rules

SCRAPE_S = 1
RATE_S = 15
"""What Grafana puts in for `$__rate_interval`."""
PORTS_OF_PROCESSES = 6
"""Behind the frontend's; Redis has none."""


class Prometheus:
    def __init__(self, folder: Path, stack: Stack) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "1s"}
        processes = range(stack.port + 1, stack.port + 1 + PORTS_OF_PROCESSES)
        ports = {"slipstream-frontend": [stack.port], "slipstream-process": list(processes)}
        for job in config["scrape_configs"]:  # names of a compose network say nothing here
            del job["dns_sd_configs"]
            targets = [f"127.0.0.1:{port}" for port in ports[job["job_name"]]]
            job["static_configs"] = [{"targets": targets, "labels": {"service": "test"}}]
            del job["relabel_configs"]
            if (
                "authorization" in job
            ):  # nobody asks for keys here: empty, as without compose.keys.yaml
                job["authorization"]["credentials_file"] = "/dev/null"
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        shutil.copy(FOLDER / "alerts.yml", folder)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str, **query: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        asked = expression.replace("$__rate_interval", f"{RATE_S}s")
        found: list[dict[str, Any]] = self.get("query", query=asked)["result"]
        return found

    def serves(self) -> bool:
        """And has read every process at least twice."""
        try:
            read = self.query(f"min(count_over_time(up[{RATE_S}s]))")
            up = self.query("sum(up)")
        except OSError:
            return False
        whole = up and float(up[0]["value"][1]) == 1 + PORTS_OF_PROCESSES
        return bool(whole and float(read[0]["value"][1]) >= 2)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


@pytest.fixture
def prometheus(stack: Stack, tmp_path: Path) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus here; it is a package of Debian's")
    server = Prometheus(tmp_path, stack)
    try:
        until(server.serves, "Prometheus to have read every process")
        yield server
    finally:
        server.close()


async def load(client: Client, rounds: int) -> None:
    """Prompts that are new and prompts with a known beginning; and one that is refused."""
    for turn in range(rounds):
        prompts = [[300 + turn] * 20 + [400 + index] * 40 for index in range(3)]
        await asyncio.gather(*(client.complete(prompt, max_tokens=12) for prompt in prompts))
        await asyncio.sleep(0.2)


async def test_every_question_has_an_answer(
    prometheus: Prometheus, stack: Stack, client: Client
) -> None:
    await load(client, rounds=8)
    reads = "sum(rate(slipstream_worker_transfer_reads_total[$__rate_interval])) > 0"
    await asyncio.to_thread(until, lambda: bool(prometheus.query(reads)), "the load to be seen")
    empty = [
        f"{panel['title']}: {target['expr']}"
        for panel in panels()
        for target in panel.get("targets", ())
        if not prometheus.query(target["expr"])
    ]
    assert not empty, "\n".join(empty)
    (asked,) = (panel for panel in panels() if panel["title"] == "Time to the first token")
    ttft = prometheus.query(asked["targets"][0]["expr"])
    assert 0.001 < float(ttft[0]["value"][1]) < 60, ttft


def test_prometheus_takes_the_alerts_and_none_rings(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    known = {rule["name"] for group in groups for rule in group["rules"]}
    assert known == {rule.get("alert") or rule["record"] for rule in rules()}
    assert all(rule["health"] in ("ok", "unknown") for group in groups for rule in group["rules"])
    firing = [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
    assert not firing
