"""Which workers only compute prompts and which take streams too: shifted as the load shifts.

Nothing is drained: streams that run stay where they are, only new ones go elsewhere. A worker goes
where it is needed if nobody needs it where it is, and home again when nobody needs it anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.scheduler.ledger import WorkerView
from slipstream.types import NodeId

PRESSED, SLACK = 1.0, 0.4
"""Pressure from which a side needs a worker, and up to which it can spare one."""
DWELL_S = 10.0
"""Between two shifts of one worker, so that what the first one brings can show."""
URGENT_S = 2.0
"""The same while nobody takes streams: long enough for the worker's answer."""
BACKLOG_S = 1.0
"""A queue of prompts as long as this is a pressure of 1."""
OCCUPANCY = 0.85
"""Streams, or their blocks, that fill so much of their workers are a pressure of 1."""


@dataclass(slots=True, frozen=True)
class Shift:
    node_id: NodeId
    accept_decode: bool


class Roles:
    def __init__(self) -> None:
        self.shifts = 0
        self._shifted_s: dict[NodeId, float] = {}

    def shift(self, views: Sequence[WorkerView], waiting: int, now_s: float) -> Shift | None:
        """At most one. `waiting`: requests for which nobody has room."""
        views = [view for view in views if view.taking and view.prefills]
        hosts = [view for view in views if view.worker.accept_decode]
        sources = [view for view in views if not view.worker.accept_decode]
        prompts, streams = prompt_pressure(sources, now_s), stream_pressure(hosts, waiting)
        chosen: WorkerView | None = None
        if streams >= PRESSED and prompts <= SLACK and sources:
            chosen = min(sources, key=lambda view: view.backlog_s(now_s))
        elif prompts >= PRESSED and streams <= SLACK and len(hosts) > 1:
            chosen = min(hosts, key=lambda view: len(view.streams))
        else:
            chosen = next((v for v in views if self._may_go_home(v, hosts, prompts, streams)), None)
        dwell_s = DWELL_S if hosts else URGENT_S
        if chosen is None or now_s < self._shifted_s.get(chosen.node_id, -DWELL_S) + dwell_s:
            return None
        self._shifted_s = {v.node_id: self._shifted_s.get(v.node_id, -DWELL_S) for v in views}
        self._shifted_s[chosen.node_id] = now_s
        self.shifts += 1
        return Shift(chosen.node_id, not chosen.worker.accept_decode)

    def _may_go_home(
        self, view: WorkerView, hosts: Sequence[WorkerView], prompts: float, streams: float
    ) -> bool:
        """Whether it was shifted, and nobody needs it any more."""
        if not view.worker.shifted:
            return False
        return streams <= SLACK and len(hosts) > 1 if view in hosts else prompts <= SLACK


def prompt_pressure(sources: Sequence[WorkerView], now_s: float) -> float:
    """Of prompts on the workers that do nothing else. Without such workers there is none: prompts
    are computed where they decode."""
    if not sources:
        return 0.0
    return sum(view.backlog_s(now_s) for view in sources) / len(sources) / BACKLOG_S


def stream_pressure(hosts: Sequence[WorkerView], waiting: int) -> float:
    """Of streams on the workers that take them."""
    if not hosts:
        return float("inf")
    full = [max(len(v.held) / v.worker.max_num_seqs, v.blocks / v.worker.num_blocks) for v in hosts]
    return max(sum(full) / len(full) / OCCUPANCY, PRESSED if waiting else 0.0)
