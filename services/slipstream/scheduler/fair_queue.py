"""Who waits, in the order in which they go: what has begun first, then by priority, and of equal
priority each tenant in its turn.

Start-time fair queueing (Goyal, Vin, Cheng, 1996), in tokens of virtual time: a request starts
where its tenant's last one ends, or now if that is past, and lasts for its cost over its tenant's
weight. Who has queued five hundred goes after the one of somebody else; of one tenant alone the
first come goes first. Deficit round robin divides as fairly, but cannot say how many are before
somebody.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from slipstream.scheduler.request import Request
from slipstream.types import RequestId

ENDS_MIN = 16
"""So many tenants are remembered before those are forgotten whose last turn is past."""

_Place: TypeAlias = tuple[float, float, int, Request]
"""Rank, start, number of arrival: which is never equal, so that requests are not compared."""


@dataclass(slots=True)
class _Lane:
    """What waits with one priority."""

    now: float = 0.0
    """The latest start of those that have gone."""
    waiting: dict[str, dict[int, float]] = field(default_factory=dict)
    """Tenant -> number of arrival -> where it ends."""
    ends: dict[str, float] = field(default_factory=dict)
    """Tenant -> where the last one ends that has gone: who left the queue costs nothing."""
    ends_max: int = ENDS_MIN

    def start(self, request: Request, arrival: int) -> float:
        tenant, weight = request.submit.tenant, request.submit.weight
        own = self.waiting.setdefault(tenant, {})
        last = next(reversed(own.values()), self.ends.get(tenant, 0.0))
        start = max(self.now, last)
        own[arrival] = start + request.cost_tokens / weight
        return start

    def leave(self, tenant: str, arrival: int) -> float:
        """Where it would have ended."""
        own = self.waiting[tenant]
        end = own.pop(arrival)
        if not own:
            del self.waiting[tenant]
        return end

    def went(self, tenant: str, start: float, end: float) -> None:
        # Those that no worker serves are overtaken, by later ones of their own tenant too.
        self.now, self.ends[tenant] = max(self.now, start), max(end, self.ends.get(tenant, 0.0))
        if len(self.ends) > self.ends_max:
            self.ends = {name: last for name, last in self.ends.items() if last > self.now}
            self.ends_max = max(ENDS_MIN, 2 * len(self.ends))


class FairQueue:
    def __init__(self) -> None:
        self.num_tokens = 0
        """Of all that wait: prompts, and answers as far as they are there."""
        self._order: list[_Place] = []
        self._places: dict[RequestId, _Place] = {}
        self._lanes: dict[float, _Lane] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._places

    def __iter__(self) -> Iterator[Request]:
        """In order. Not to be changed meanwhile."""
        return (place[3] for place in self._order)

    @property
    def head(self) -> Request:
        return self._order[0][3]

    def join(self, request: Request) -> int:
        """How many are before it now. What has begun goes to the head, the latest first."""
        self._arrivals += 1
        if request.resumed:
            place = (request.rank, 0.0, -self._arrivals, request)
        else:
            lane = self._lanes.setdefault(request.rank, _Lane())
            start = lane.start(request, self._arrivals)
            place = (request.rank, start, self._arrivals, request)
        ahead = bisect_left(self._order, place)
        self._order.insert(ahead, place)
        self._places[request.request_id] = place
        self.num_tokens += request.num_tokens
        return ahead

    def take(self, request: Request) -> None:
        """It is its turn, and it goes."""
        rank, start, *_ = self._places[request.request_id]
        lane, end = self._lanes.get(rank), self._leave(request)
        if lane is not None:
            lane.went(request.submit.tenant, start, end)

    def remove(self, request: Request) -> None:
        """It waits no more, if it did. It has had nothing: its tenant's others move up."""
        if request.request_id not in self._places:
            return
        rank, start, arrival, _ = self._places[request.request_id]
        freed = self._leave(request) - start
        if (lane := self._lanes.get(rank)) is not None:
            self._move_up(lane.waiting.get(request.submit.tenant, {}), arrival, freed)

    def _move_up(self, own: dict[int, float], gone: int, freed: float) -> None:
        behind = {arrival for arrival in own if arrival > gone}
        if not behind:
            return
        for arrival in behind:
            own[arrival] -= freed
        for at, (rank, start, arrival, request) in enumerate(self._order):
            if arrival in behind:
                place = (rank, start - freed, arrival, request)
                self._order[at] = self._places[request.request_id] = place
        self._order.sort(key=lambda place: place[:3])

    def _leave(self, request: Request) -> float:
        """Where it ends among those of its priority, if it is not one that has begun."""
        place = self._places.pop(request.request_id)
        del self._order[bisect_left(self._order, place)]
        self.num_tokens -= request.num_tokens
        lane = self._lanes.get(place[0])
        if lane is None:
            return 0.0
        end = lane.leave(request.submit.tenant, place[2])
        if not lane.waiting:
            del self._lanes[place[0]]
        return end

    def check(self) -> None:
        assert self._order == sorted(self._order, key=lambda place: place[:3])
        assert {place[3].request_id for place in self._order} == self._places.keys()
        assert self.num_tokens == sum(request.num_tokens for request in self)
        waiting = [own for lane in self._lanes.values() for own in lane.waiting.values()]
        assert all(waiting)
        assert sum(map(len, waiting)) == sum(place[2] > 0 for place in self._order)
