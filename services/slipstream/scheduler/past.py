"""Requests that have ended: what to answer when somebody asks for one again, and how fast they
end."""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass

from slipstream.errors import ErrorCode, Problem
from slipstream.types import RequestId

TOMBSTONE_S = 60.0
TOMBSTONES_MAX = 65_536
RATE_WINDOW_S = 10.0
PACE_KNOWN_S = 2.0
"""A shorter time says nothing of the pace."""
RETRY_AFTER_MAX_S = 60.0


@dataclass(slots=True, frozen=True)
class Tombstone:
    attempt: int
    problem: Problem | None
    until_s: float


class Past:
    def __init__(self) -> None:
        self._tombstones: OrderedDict[RequestId, Tombstone] = OrderedDict()
        self._ends: deque[float] = deque(maxlen=4096)

    def bury(
        self, request_id: RequestId, attempt: int, problem: Problem | None, now_s: float
    ) -> None:
        if problem is None or problem.code is not ErrorCode.QUEUE_FULL:  # that had no place
            self._ends.append(now_s)
        self._tombstones[request_id] = Tombstone(attempt, problem, now_s + TOMBSTONE_S)
        self._tombstones.move_to_end(request_id)
        if len(self._tombstones) > TOMBSTONES_MAX:
            self._tombstones.popitem(last=False)

    def find(self, request_id: RequestId) -> Tombstone | None:
        return self._tombstones.get(request_id)

    def expire(self, now_s: float) -> None:
        while self._tombstones and next(iter(self._tombstones.values())).until_s <= now_s:
            self._tombstones.popitem(last=False)

    def retry_after_s(self, now_s: float) -> float:
        """When one of the live requests should have ended, by the pace of late."""
        recent = sum(end > now_s - RATE_WINDOW_S for end in self._ends)
        return min(RETRY_AFTER_MAX_S, max(1.0, RATE_WINDOW_S / recent)) if recent else 5.0

    def pace_per_s(self, since_s: float, now_s: float) -> float:
        """Requests that end in a second, as of late, but not from before `since_s`; that is when
        all places were taken. Infinite while that is too short a time to tell."""
        begin_s = max(since_s, now_s - RATE_WINDOW_S)
        if now_s - begin_s < PACE_KNOWN_S:
            return math.inf
        return (1 + sum(end > begin_s for end in self._ends)) / (now_s - begin_s)
