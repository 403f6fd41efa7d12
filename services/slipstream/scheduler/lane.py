"""The requests for one model: their queue, and how fast it moves."""

import math
from collections import deque

from slipstream.scheduler.fair_queue import FairQueue
from slipstream.scheduler.roles import Roles

RATE_WINDOW_S = 10.0
PACE_KNOWN_S = 2.0
"""A shorter time says nothing of the pace."""
RETRY_AFTER_MAX_S = 60.0

LATE_SHARE = 0.98
LATE_KNOWN, LATE_MAX = 16, 64
"""First tokens of late that it takes to know how late they come, and that are looked at."""
LATE_FRESH_S = 10.0
"""So long after the last first token nothing is known of how late they come."""


class Pace:
    """Requests that end in a second."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=4096)

    def ended(self, now_s: float) -> None:
        self._ends.append(now_s)

    def retry_after_s(self, now_s: float) -> float:
        """When one of the live requests should have ended, by the pace of late."""
        recent = sum(end > now_s - RATE_WINDOW_S for end in self._ends)
        return min(RETRY_AFTER_MAX_S, max(1.0, RATE_WINDOW_S / recent)) if recent else 5.0

    def per_s(self, since_s: float, now_s: float) -> float:
        """As of late, but not from before `since_s`; that is when all places were taken. Infinite
        while that is too short a time to tell."""
        begin_s = max(since_s, now_s - RATE_WINDOW_S)
        if now_s - begin_s < PACE_KNOWN_S:
            return math.inf
        return (1 + sum(end > begin_s for end in self._ends)) / (now_s - begin_s)


class Lateness:
    """How long after their prediction first tokens come."""

    def __init__(self) -> None:
        self._late: deque[float] = deque(maxlen=LATE_MAX)
        self._margin_s, self._learnt_s = 0.0, -math.inf

    def learn(self, late_s: float, now_s: float) -> None:
        if now_s - self._learnt_s > LATE_FRESH_S:
            self._late.clear()
        self._late.append(late_s)
        late = sorted(self._late)[int(LATE_SHARE * len(self._late))]
        self._margin_s = max(0.0, late) if len(self._late) >= LATE_KNOWN else 0.0
        self._learnt_s = now_s

    def margin_s(self, now_s: float) -> float:
        """What all but one in fifty first tokens of late came after their prediction, at most."""
        return self._margin_s if now_s - self._learnt_s <= LATE_FRESH_S else 0.0


class Lane:
    """Models do not wait for each other: where one's workers are full, another's may be idle."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.queue = FairQueue()
        self.roles = Roles()
        self.pace, self.lateness = Pace(), Lateness()
        self.full_since_s = 0.0
        """When the queue of those began for whom there are workers; since then all places are
        taken."""
        self.whole_s = math.inf
        """When there were last workers for everything; infinite until the first look."""
        self.lacks_s: dict[str, float] = {}
        """What somebody waits for and no worker has -> since when."""
        self.longest: dict[str, int] = {}
        """Adapter -> tokens of the longest request that its workers serve."""
