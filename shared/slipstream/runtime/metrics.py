"""Prometheus text from a machine's statistics."""

import re
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


def metrics(statistics: Mapping[str, float], node_id: str, role: str) -> bytes:
    """One metric `slipstream_{key}` for each key, with the labels node_id and role.

    Keys that end in `_total` are counters, the others gauges. The process's own metrics follow.
    """
    registry = CollectorRegistry()
    registry.register(_Statistics(statistics, node_id, role))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Statistics(Collector):
    def __init__(self, statistics: Mapping[str, float], node_id: str, role: str) -> None:
        self._statistics = statistics
        self._labels = {"node_id": node_id, "role": role}

    def collect(self) -> Iterator[Metric]:
        for key, value in sorted(self._statistics.items()):
            name = "slipstream_" + _NOT_IN_A_NAME.sub("_", key)
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, key.replace("_", " "), labels=list(self._labels))
            metric.add_metric(list(self._labels.values()), value)
            yield metric
