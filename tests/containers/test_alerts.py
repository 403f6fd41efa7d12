"""Alerts that no stack can be made to ring in a test's time, played to Prometheus as series."""

import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from containers.test_files import FOLDER
from docs.pages import REPOSITORY, blocks_of

ALERTS = FOLDER / "observability" / "alerts.yml"


class Ring(NamedTuple):
    labels: dict[str, str]
    summary: str


def told(tmp_path: Path, series: dict[str, str], alert: str, at: dict[str, list[Ring]]) -> str:
    """What promtool has against it; empty: `alert` rings so `at` these times."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here; it is in Debian's package prometheus")
    rules = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    (rule,) = (one for group in rules for one in group["rules"] if one.get("alert") == alert)

    def rings(ring: Ring) -> dict[str, Any]:
        labels = {**rule["labels"], **ring.labels}
        return {"exp_labels": labels, "exp_annotations": {"summary": ring.summary}}

    test = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "alert_rule_test": [
                    {
                        "eval_time": time,
                        "alertname": alert,
                        "exp_alerts": [rings(r) for r in all_of],
                    }
                    for time, all_of in at.items()
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


MISSING = "SlipstreamProcessMissing"
IS_MISSING = Ring(
    {"service": "decode"}, "Fewer processes of decode answer than the 2 of the last hour."
)


def up(service: str, instance: int) -> str:
    return f'up{{job="slipstream-process",service="{service}",instance="10.0.0.{instance}:9100"}}'


GONE = "1x20 stale"
"""For five minutes; then Prometheus finds it no more, and says so at once."""


@pytest.mark.parametrize(
    "other", [GONE, "1x20 0x400", "1x400"], ids=["none left", "one down", "one left"]
)
def test_a_process_that_is_off_the_list_rings(tmp_path: Path, other: str) -> None:
    series = {up("decode", 1): GONE, up("decode", 2): other, up("prefill", 3): "1x400"}
    at = {"5m": [], "6m": [], "7m": [IS_MISSING], "60m": [IS_MISSING]}
    assert told(tmp_path, series, MISSING, at) == ""


def test_one_that_comes_back_under_another_address_rings_no_more(tmp_path: Path) -> None:
    series = {up("decode", 1): GONE, up("decode", 2): "1x400", up("decode", 4): "_x40 1x300"}
    at = {"6m": [], "7m": [IS_MISSING], "11m": [], "60m": []}
    assert told(tmp_path, series, MISSING, at) == ""


def test_one_that_is_away_for_seconds_does_not_ring(tmp_path: Path) -> None:
    series = {up("decode", 1): GONE, up("decode", 2): "1x400", up("decode", 4): "_x22 1x300"}
    at = {f"{minute}m": [] for minute in (5, 6, 7, 8)}
    assert told(tmp_path, series, MISSING, at) == ""


def test_one_more_while_they_are_replaced_is_none_too_few_later(tmp_path: Path) -> None:
    series = {
        up("decode", 1): "1x120 stale",
        up("decode", 2): "1x126 stale",
        up("decode", 3): "_x116 1x300",
        up("decode", 4): "_x122 1x300",
    }
    at = {f"{minute}m": [] for minute in (29, 30, 31, 32, 33, 34, 45, 60)}
    assert told(tmp_path, series, MISSING, at) == ""


def test_who_was_scaled_down_rings_for_an_hour(tmp_path: Path) -> None:
    series = {up("decode", 1): GONE, up("decode", 2): "1x400"}
    assert told(tmp_path, series, MISSING, {"64m": [IS_MISSING], "66m": []}) == ""


def test_a_worker_is_idle_by_its_own_model(tmp_path: Path) -> None:
    """What waits for another model is not for it, nor what waits in a worker."""

    def worker(name: str, node: str, model: str) -> str:
        return f'slipstream_worker_{name}{{node_id="{node}",role="decode",model_name="{model}"}}'

    series = {'vllm:num_requests_waiting{model_name="a"}': "3x40"}
    series['vllm:num_requests_waiting{model_name="b"}'] = "0x40"
    for node, model, running in (("decode-0", "a", 0), ("decode-1", "a", 9), ("decode-2", "b", 0)):
        series[worker("running", node, model)] = f"{running}x40"
        series[worker("waiting", node, model)] = "0x40"
        series[worker("accepts_streams", node, model)] = "1x40"
    series['vllm:num_requests_waiting{model_name="c"}'] = "5x40"
    for node, waiting in (("decode-3", 0), ("prefill-0", 5)):
        series[worker("running", node, "c")] = "0x40"
        series[worker("waiting", node, "c")] = f"{waiting}x40"
        series[worker("accepts_streams", node, "c")] = "1x40"
    told_of = "decode-0 has nothing to do while requests for its model wait."
    idle = Ring({"node_id": "decode-0", "model_name": "a"}, told_of)
    at = {"15s": [], "45s": [idle], "5m": [idle]}
    assert told(tmp_path, series, "SlipstreamDecodeIdle", at) == ""


def test_a_prometheus_without_compose_has_the_same_jobs(tmp_path: Path) -> None:
    """The list of targets on the page, whose jobs the dashboard and the alerts ask for."""
    page = REPOSITORY / "docs" / "observing.md"
    (block,) = (one for one in blocks_of(page) if "scrape_configs:" in one.text)
    shown = yaml.safe_load(block.text)
    ours = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text(encoding="utf-8"))
    jobs = {
        job["job_name"]: {target["labels"]["service"] for target in job["static_configs"]}
        for job in shown["scrape_configs"]
    }
    assert jobs == {
        job["job_name"]: set(job["dns_sd_configs"][0]["names"]) for job in ours["scrape_configs"]
    }
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here; it is in Debian's package prometheus")
    (tmp_path / "prometheus.yml").write_text(block.text, encoding="utf-8")
    shutil.copy(ALERTS, tmp_path)
    words = [promtool, "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
