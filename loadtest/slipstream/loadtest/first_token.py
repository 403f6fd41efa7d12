"""Where the time to a first token goes: the stations of single requests, in recordings."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from slipstream.runtime.record import read
from slipstream.types import Role


class Station(NamedTuple):
    """An event of a machine that a request passes on its way."""

    leg: str
    """What it comes from."""
    role: Role
    event: str
    message: str = ""
    """Of what was received."""


STATIONS = (
    Station("HTTP, checks", Role.FRONTEND, "Opened"),
    Station("frontend to tokenizer", Role.TOKENIZER, "Received", "Tokenize"),
    Station("template, encoding", Role.TOKENIZER, "Encoded"),
    Station("tokenizer to scheduler", Role.SCHEDULER, "Received", "Submit"),
    Station("scheduler to index", Role.KVINDEX, "Received", "Locate"),
    Station("Redis, index to scheduler", Role.SCHEDULER, "Received", "Located"),
    Station("scheduler to worker", Role.DECODE, "Received", "Decode"),
    Station("step", Role.DECODE, "BatchDone"),
    Station("worker to tokenizer", Role.TOKENIZER, "Received", "TokensOut"),
    Station("tokenizer to frontend", Role.FRONTEND, "Received", "TextOut"),
)
LAST_LEG = "SSE"


class Passed(NamedTuple):
    """An event, as it was recorded."""

    at_s: float
    role: str
    event: str
    message: str


def passed(folder: Path) -> list[Passed]:
    """All events of all processes that were recorded in `folder`, in order of time."""
    found = []
    for path in folder.glob("*.rec"):
        role = next(role for role in Role if path.name.startswith(role))
        for at_s, name, fields in read(path):
            message = fields.get("message")
            kind = str(message.get("type", "")) if isinstance(message, dict) else ""
            found.append(Passed(at_s, role, name, kind))
    return sorted(found)


def legs_ms(
    events: Sequence[Passed], spans: Iterable[tuple[float, float]]
) -> dict[str, list[float]]:
    """Of requests that came one after the other, each sent and answered at such times, ms by leg.

    A station that a request did not pass adds its leg to the next one.
    """
    legs: dict[str, list[float]] = {}
    at = 0
    for sent_s, first_s in spans:
        times = [("", sent_s)]
        while at < len(events) and events[at].at_s < sent_s:
            at += 1
        ahead = at
        for station in STATIONS:
            wanted = station[1:]
            index = next((i for i in range(ahead, len(events)) if events[i][1:] == wanted), None)
            if index is None or events[index].at_s > first_s:
                continue
            ahead = index
            times.append((station.leg, events[index].at_s))
        times.append((LAST_LEG, first_s))
        for (_, before_s), (leg, then_s) in pairwise(times):
            legs.setdefault(leg, []).append((then_s - before_s) * 1e3)
    return legs


def table(legs: dict[str, list[float]]) -> str:
    lines = ["| leg | median, ms | p90, ms |", "|---|---:|---:|"]
    for leg, values_ms in legs.items():
        p90_ms = statistics.quantiles(values_ms, n=10)[8] if len(values_ms) > 1 else values_ms[0]
        lines.append(f"| {leg} | {statistics.median(values_ms):.2f} | {p90_ms:.2f} |")
    return "\n".join(lines)
