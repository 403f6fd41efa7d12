"""Requests that have ended: what to answer when somebody asks for one again."""

from collections import OrderedDict
from dataclasses import dataclass

from slipstream.errors import Problem
from slipstream.types import RequestId

TOMBSTONE_S = 60.0
TOMBSTONES_MAX = 65_536


@dataclass(slots=True, frozen=True)
class Tombstone:
    attempt: int
    problem: Problem | None
    until_s: float


class Past:
    def __init__(self) -> None:
        self._tombstones: OrderedDict[RequestId, Tombstone] = OrderedDict()

    def bury(
        self, request_id: RequestId, attempt: int, problem: Problem | None, now_s: float
    ) -> None:
        self._tombstones[request_id] = Tombstone(attempt, problem, now_s + TOMBSTONE_S)
        self._tombstones.move_to_end(request_id)
        if len(self._tombstones) > TOMBSTONES_MAX:
            self._tombstones.popitem(last=False)

    def find(self, request_id: RequestId) -> Tombstone | None:
        return self._tombstones.get(request_id)

    def expire(self, now_s: float) -> None:
        while self._tombstones and next(iter(self._tombstones.values())).until_s <= now_s:
            self._tombstones.popitem(last=False)
