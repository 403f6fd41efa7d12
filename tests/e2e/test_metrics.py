"""Every metric that the dashboard and the alerts ask for is on a page of a real stack, with a help
text; and Prometheus understands the questions."""

import asyncio
import json
import re
import shutil
import subprocess
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from e2e.client import Client
from e2e.stack import Stack, until
from slipstream.runtime.metrics import UNDESCRIBED

FOLDER = Path(__file__).resolve().parents[2] / "compose" / "observability"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "slipstream.json"
OPERATOR_KEY = "/run/secrets/operator-key"
ROWS = [
    *("Service level", "Load", "Prefill and decode", "KV cache", "Transfers"),
    *("Processes", "Clients"),
]
OF_PROMETHEUS = {"up"}
TARGET_LABELS = {"job", "instance", "service"}
"""Set by the scrape, not by the page."""
NOT_METRICS = (
    r"\b(?:by|on|without|ignoring) ?\([^)]*\)",  # lists of labels
    r"\[[^]]*\]",  # ranges
    r"\b\w+(?= *\()",  # functions
    r"\b(?:and|or|unless)\b",
    r"(?<![\w:])[\d.]+",  # numbers
)


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def rules() -> list[dict[str, Any]]:
    text = (FOLDER / "alerts.yml").read_text(encoding="utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    asked = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return asked + [rule["expr"] for rule in rules()]


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels that it is chosen by) of each metric in an expression."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    for other in NOT_METRICS:
        bare = re.sub(other, " ", bare)
    for match in re.finditer(r"([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?", bare):
        yield match[1], set(re.findall(r"(\w+) ?[=!]", match[2] or ""))


def grouped_by(expression: str) -> set[str]:
    lists = re.findall(r"\b(?:by|on|ignoring) ?\(([^)]*)\)", expression)
    return {label.strip() for one in lists for label in one.split(",") if label.strip()}


@pytest.fixture
async def pages(stack: Stack, client: Client) -> list[Metric]:
    """All families of the frontend's page and of each process's own."""
    answer = await client.complete([200 + index for index in range(40)], max_tokens=4)
    assert answer.headers["x-slipstream-path"] == "prefill-0>decode-0"
    told = "worker_transfer_shm_reads_total"
    await asyncio.to_thread(until, lambda: stack.gauges().get(("decode-0", told)), "a load")
    ports = range(stack.port, stack.port + 7)
    return [family for port in ports for family in _page(port)]


def _page(port: int) -> list[Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        return list(text_string_to_metric_families(reply.read().decode()))


async def test_every_metric_asked_for_exists(pages: list[Metric]) -> None:
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for family in pages:
        for sample in family.samples:
            labels[sample.name] |= sample.labels.keys()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    everywhere = set().union(*labels.values())
    for expression in expressions():
        found = list(selectors(expression))
        assert found, expression
        for name, chosen_by in found:
            assert name in labels.keys() | recorded | OF_PROMETHEUS, f"{name} in {expression}"
            if name not in OF_PROMETHEUS:
                assert chosen_by <= labels[name] | TARGET_LABELS, f"{name} in {expression}"
        assert grouped_by(expression) <= everywhere | TARGET_LABELS, expression


async def test_every_metric_has_a_help_text(pages: list[Metric]) -> None:
    for family in pages:
        assert family.documentation.endswith("."), family.name
        assert family.documentation != UNDESCRIBED, family.name


async def test_what_labels_there_are(pages: list[Metric]) -> None:
    """A label with a value for each client or path would be a series for each."""
    allowed = {"node_id", "role", "transport", "code", "reason", "model_name", "finished_reason"}
    allowed |= {"le", "block_size", "num_gpu_blocks"}
    for family in pages:
        for sample in family.samples:
            assert sample.labels.keys() <= allowed, sample


async def test_an_answer_is_in_the_histograms(stack: Stack, client: Client) -> None:
    def said() -> dict[str, float]:
        vllm = [family for family in _page(stack.port) if family.name.startswith("vllm:")]
        return {sample.name: sample.value for family in vllm for sample in family.samples}

    before = said()
    await client.complete([700 + index for index in range(30)], max_tokens=5, ignore_eos=True)
    after = said()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown["vllm:e2e_request_latency_seconds_count"] == 1
    assert 1 <= grown["vllm:inter_token_latency_seconds_count"] <= 4
    assert grown["vllm:request_prompt_tokens_sum"] == grown["vllm:prompt_tokens_total"] == 30
    assert grown["vllm:request_generation_tokens_sum"] == grown["vllm:generation_tokens_total"] == 5
    first_s = grown["vllm:time_to_first_token_seconds_sum"]
    decode_s = grown["vllm:request_decode_time_seconds_sum"]
    assert 0 < first_s + decode_s <= grown["vllm:e2e_request_latency_seconds_sum"]


def test_the_dashboard_has_the_seven_rows() -> None:
    found = panels()
    assert [panel["title"] for panel in found if panel["type"] == "row"] == ROWS
    assert len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        assert panel["type"] == "row" or panel["targets"], panel["title"]


def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here; it is in Debian's package prometheus")
    asked = [expression.replace("$__rate_interval", "1m") for expression in expressions()]
    group = {
        "name": "asked",
        "rules": [{"record": f"x:{i}", "expr": e} for i, e in enumerate(asked)],
    }
    (tmp_path / "asked.yml").write_text(yaml.safe_dump({"groups": [group]}), encoding="utf-8")
    config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    assert config.count(OPERATOR_KEY) == 1, "a mount of compose.observability.yaml"
    (tmp_path / "key").touch()
    (tmp_path / "prometheus.yml").write_text(config.replace(OPERATOR_KEY, "key"), encoding="utf-8")
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    checks = (
        ("rules", tmp_path / "asked.yml"),
        ("rules", FOLDER / "alerts.yml"),
        ("config", tmp_path / "prometheus.yml"),
    )
    for what, file in checks:
        told = subprocess.run(
            [promtool, "check", what, str(file)], capture_output=True, text=True, check=False
        )
        assert told.returncode == 0, told.stdout + told.stderr
