"""Prometheus text from statistics: what they are called, what they say, and histograms of them."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slipstream.runtime.metric_table import KINDS, Labelled
from slipstream.types import TRANSPORTS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "slipstream_"
UNDESCRIBED = "Not described here: it comes from a process of another version."

_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]")
_Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily


def metrics(
    statistics: Mapping[str, float], node_id: str, role: str, *, shell: bool = True
) -> bytes:
    """`families` of one process, with the labels node_id and role, and the kernel's numbers of it.

    `shell`: whether the shell's own statistics are among them.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    said = [({"node_id": node_id, "role": str(role)}, statistics)]
    kinds = (str(role), "shell") if shell else (str(role),)
    return text(families(PREFIX, kinds, said)) + generate_latest(registry)


def text(families: Iterable[Metric]) -> bytes:
    return generate_latest(_Given(families))


class _Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def families(
    prefix: str,
    kinds: Sequence[str],
    said: Iterable[tuple[Mapping[str, str], Mapping[str, float]]],
) -> list[Metric]:
    """One family `{prefix}{key}` for each key; keys that end in `_total` are counters, the others
    gauges. `said`: labels and statistics of each process, which are all of these `kinds`.

    Counters of the table that nobody has said are 0. What the table shows with labels comes twice.
    """
    found: dict[str, _Family] = {}

    def add(name: str, help_text: str, labels: Mapping[str, str], value: float) -> None:
        name = prefix + _NOT_IN_A_NAME.sub("_", name)
        if name not in found:
            made = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            found[name] = made(name, help_text, labels=list(labels))
        found[name].add_metric(list(labels.values()), value)

    for labels, statistics in said:
        for key, value in (_zeros(*kinds) | dict(statistics)).items():
            help_text, labelled, words = _described(key, *kinds)
            add(key, help_text, labels, value)
            if labelled is not None:
                add(labelled.family, labelled.help, {**labels, **words}, value)
        has = tuple(name for name in TRANSPORTS if f"transfer_{name}_peers" in statistics)
        for labelled, words, key in _always(has, *kinds):
            if key not in statistics:
                add(labelled.family, labelled.help, {**labels, **words}, 0.0)
    return [found[name] for name in sorted(found)]


def merged(families: Iterable[Metric]) -> list[Metric]:
    """Of each name one family, with the samples of all."""
    found: dict[str, Metric] = {}
    for family in families:
        if family.name in found:
            found[family.name].samples += family.samples
        else:
            found[family.name] = family
    return list(found.values())


@lru_cache
def _zeros(*kinds: str) -> dict[str, float]:
    return {key: 0.0 for kind in kinds for key in KINDS[kind][0] if key.endswith("_total")}


@lru_cache
def _always(transports: tuple[str, ...], *kinds: str) -> list[tuple[Labelled, dict[str, str], str]]:
    """Families, labels and keys of what is shown before it has been counted."""
    found = []
    for labelled in (one for kind in kinds for one in KINDS[kind][1] if one.counts):
        values = [
            transports if name == "transport" else labelled.always for name in labelled.labels
        ]
        for chosen in product(*values):
            words = dict(zip(labelled.labels, chosen, strict=True))
            found.append((labelled, words, labelled.key.format(**words)))
    return found


@lru_cache(4096)
def _described(key: str, *kinds: str) -> tuple[str, Labelled | None, dict[str, str]]:
    """Its help, and the family that has it under labels, with these."""
    for plain, patterns in (KINDS[kind] for kind in kinds):
        if key in plain:
            return plain[key], None, {}
        for labelled in patterns:
            match = labelled.pattern.fullmatch(key)
            if match is not None:
                words = match.groupdict()
                which = ", ".join(f"{name} {word}" for name, word in words.items())
                return f"{labelled.help} Here: {which}.", labelled, words
    return UNDESCRIBED, None, {}


class Distribution:
    """A histogram, for one thread. Cheaper than prometheus_client's, which locks and keeps an
    object for each bucket."""

    def __init__(self, edges: Iterable[float]) -> None:
        """`edges`: upper bounds of the buckets, ascending, infinity left out."""
        self._edges = tuple(edges)
        self._counts = [0] * (len(self._edges) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def observe_all(self, values: list[float]) -> None:
        """Sorts them."""
        values.sort()
        self._sum += sum(values)
        start = 0
        for index, edge in enumerate(self._edges):
            end = bisect_right(values, edge, start)
            self._counts[index] += end - start
            start = end
        self._counts[-1] += len(values) - start

    def family(self, name: str, help_text: str, labels: Mapping[str, str]) -> Metric:
        family = HistogramMetricFamily(name, help_text, labels=list(labels))
        family.add_metric(list(labels.values()), list(self._buckets()), self._sum)
        return family

    def _buckets(self) -> Iterator[tuple[str, float]]:
        below = 0
        for edge, count in zip((*self._edges, float("inf")), self._counts, strict=True):
            below += count
            yield "+Inf" if edge == float("inf") else str(float(edge)), float(below)
