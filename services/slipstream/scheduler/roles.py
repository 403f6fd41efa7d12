"""Which workers only compute prompts and which take streams too: shifted as the load shifts.

As many workers keep to prompts as the prompts of late would fill: fewer prompts than for half a
worker and all take streams, for a worker without them would idle; more, and those that keep to
prompts spare the streams of the others. Nothing is drained: streams that run stay where they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from slipstream.scheduler.ledger import WorkerView
from slipstream.types import NodeId, Role

MEMORY_S = 15.0
"""How fast the demand of the past is forgotten."""
MORE, FEWER = 0.45, 0.9
"""Workers' worth of prompts that call for one more, or that idle before there is one fewer."""
FULL = 0.85
"""Streams, or their blocks, that fill so much of their workers: more of them are needed."""
DWELL_S = 10.0
"""Between two shifts of one worker, so that what the first one brings can show."""
URGENT_S = 2.0
"""The same while nobody takes streams: long enough for the worker's answer."""


@dataclass(slots=True, frozen=True)
class Shift:
    node_id: NodeId
    accept_decode: bool
    why: str = field(default="", compare=False)

    @property
    def line(self) -> str:
        """For the log."""
        words = "prompts alone", "prompts and streams"
        before, after = words if self.accept_decode else reversed(words)
        return f"{self.node_id} shifts from {before} to {after}: {self.why}"


class Demand:
    """Seconds of work that prompts bring in a second, of late: so many workers they would fill."""

    def __init__(self) -> None:
        self._work_s = self._at_s = 0.0

    def add(self, work_s: float, now_s: float) -> None:
        self._work_s = self.workers(now_s) * MEMORY_S + work_s
        self._at_s = now_s

    def workers(self, now_s: float) -> float:
        age_s = max(0.0, now_s - self._at_s)
        return self._work_s * math.exp(-age_s / MEMORY_S) / MEMORY_S


class Roles:
    def __init__(self) -> None:
        self.demand = Demand()
        self.shifts = 0
        self._shifted_s: dict[NodeId, float] = {}

    def shift(self, views: Sequence[WorkerView], waiting: int, now_s: float) -> Shift | None:
        """At most one. `waiting`: requests for which nobody has room."""
        views = [view for view in views if view.taking]
        hosts = [view for view in views if view.worker.accept_decode]
        sources = [view for view in views if not view.worker.accept_decode]
        chosen, why = self._chosen(hosts, sources, waiting, now_s)
        dwell_s = DWELL_S if hosts else URGENT_S
        if chosen is None or now_s < self._shifted_s.get(chosen.node_id, -DWELL_S) + dwell_s:
            return None
        self._shifted_s = {v.node_id: self._shifted_s.get(v.node_id, -DWELL_S) for v in views}
        self._shifted_s[chosen.node_id] = now_s
        self.shifts += 1
        return Shift(chosen.node_id, not chosen.worker.accept_decode, why)

    def _chosen(
        self,
        hosts: Sequence[WorkerView],
        sources: Sequence[WorkerView],
        waiting: int,
        now_s: float,
    ) -> tuple[WorkerView | None, str]:
        """And why."""
        views = [*hosts, *sources]
        spoil = [view for view in sources if not spares(view, views)]
        if spoil:
            return spoil[0], "streams run on its device"
        wanted = self.demand.workers(now_s)
        full = bool(waiting) or fullness(hosts) >= FULL
        why = f"prompts would fill {wanted:.1f} workers, {len(sources)} keep to them"
        if not hosts:
            why = "nobody takes streams"
        elif waiting:
            why = f"requests that wait for room: {waiting}"
        elif full:
            why = f"workers that take streams are {fullness(hosts):.0%} full"
        if sources and (full or len(sources) - wanted >= FEWER):
            return min(sources, key=lambda v: (v.node.role is Role.PREFILL, v.costs(now_s)[1])), why
        if len(hosts) > 1 and not full and wanted - len(sources) >= MORE:
            able = [view for view in hosts if view.prefills and spares(view, views)]
            return min(
                able, key=lambda v: (v.node.role is Role.DECODE, len(v.streams)), default=None
            ), why
        return None, why


def spares(view: WorkerView, views: Sequence[WorkerView]) -> bool:
    """Whether others' streams go on undisturbed while it computes: not those on its device."""
    beside = (other for other in views if other is not view and other.device == view.device)
    return not any(other.streams or other.worker.accept_decode for other in beside)


def fullness(hosts: Sequence[WorkerView]) -> float:
    """Of the workers that take streams, with streams; without such workers there is no room."""
    if not hosts:
        return 1.0
    full = [max(len(v.held) / v.worker.max_num_seqs, v.blocks / v.worker.num_blocks) for v in hosts]
    return sum(full) / len(full)
