"""Requests that may be what kills workers.

That a worker is lost does not tell which of its requests did it, if any did. One that is lost twice
without a new token in between is suspect. If it is the only one, that is enough. If there are
several, they run one at a time until they have made a token, and the next loss tells.
"""

from collections.abc import Iterable, Sequence

from slipstream.errors import ErrorCode, Problem
from slipstream.messages import AttemptFailed, NodeInfo
from slipstream.scheduler.request import Request, State
from slipstream.types import RequestId

CRASHES_MAX = 2
SILENT_S = 2.0
"""Workers report twice a second: one that has not for so long was dead by then, or as good as."""


class Suspects:
    def __init__(self) -> None:
        self._alone: Request | None = None
        """Of the suspects the one that runs."""
        self._waiting: dict[RequestId, Request] = {}

    def died(self, node: NodeInfo, heard_s: float, requests: Iterable[Request]) -> list[Request]:
        """A worker is not there any more, and was heard last at `heard_s`. Who of all these is to
        blame: not who was sent to one that had fallen silent before."""
        if node.draining:
            return []  # it left
        name = node.node_id
        there = [r for r in requests if name in (*r.workers, r.fell_with)]
        return self._lost([r for r in there if r.given_s(name) < heard_s + SILENT_S])

    def failed(self, request: Request, message: AttemptFailed) -> bool:
        """An attempt was given up; whether the request is to blame."""
        request.fell_with, request.fell_s = request.lost_by(message.cause), request.placed_s
        stepped = message.cause.startswith("step:")
        return stepped and bool(self._lost([request], message.beside))

    def _lost(self, requests: Sequence[Request], others: int = 0) -> list[Request]:
        """Together, by one death, and with them `others` of which word comes by itself."""
        for request in requests:
            request.crashes += 1
        suspects = [request for request in requests if request.crashes >= CRASHES_MAX]
        if len(suspects) == 1 and not others:
            return suspects
        return [request for request in suspects if request is self._alone]

    def admits(self, request: Request) -> bool:
        """Whether it may run now; if not, `freed` says when."""
        if request.crashes < CRASHES_MAX:
            return True
        if self._alone not in (None, request):
            self._waiting[request.request_id] = request
            return False
        self._alone = request
        return True

    def freed(self, request: Request) -> Request | None:
        """It has made a token, or is over. Who may run now."""
        request.crashes, request.fell_with = 0, ""
        self._waiting.pop(request.request_id, None)
        if request is not self._alone:
            return None
        self._alone = None
        while self._waiting:
            following = self._waiting.pop(next(iter(self._waiting)))
            if following.state is State.PROBATION:
                return following
        return None


def quarantined(request: Request) -> Problem:
    return Problem(
        code=ErrorCode.QUARANTINED,
        message=f"{request.crashes} workers died in a row while they computed this request. It is "
        "not tried again; change it, or tell who runs the server.",
    )
