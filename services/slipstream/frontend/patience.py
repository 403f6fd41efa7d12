"""Whether requests are taken: while their model can be served, and for a while after.

A process that is started anew is away for seconds. Who comes then waits for it, instead of being
sent away: so one service after the other can be replaced while requests run.
"""

import math

from slipstream.core.machine import Event, Received
from slipstream.core.membership import Membership
from slipstream.messages import ModelState, Peers
from slipstream.types import Role

MODELS_MAX = 1024
_NOBODY = ModelState(name="", missing="no worker of this model")


class Patience:
    """Of a model; without a name, of the cluster: it serves if it serves some model."""

    def __init__(self, membership: Membership, recovery_wait_s: float) -> None:
        self._membership, self._wait_s = membership, recovery_wait_s
        self._served_s: dict[str, float] = {}
        """When each was last known to be whole."""

    def before(self, event: Event, now_s: float) -> None:
        """To be told of every event before anybody else is: it may end what is true now."""
        if isinstance(event, Received) and not isinstance(event.message, Peers):
            return
        for model in ("", *self._membership.models):
            if not self.missing(now_s, model):
                self._served_s.pop(model, None)
                self._served_s[model] = now_s
        while len(self._served_s) > MODELS_MAX:
            del self._served_s[next(iter(self._served_s))]

    def missing(self, now_s: float, model: str = "") -> str:
        """To serve a request now, in words; empty if nothing is."""
        membership = self._membership
        if not membership.ready:
            return membership.reason or "the cluster is starting"
        if not membership.scheduler_up:
            return "the scheduler is silent"
        if model and (missing := membership.models.get(model, _NOBODY).missing):
            return missing
        if not membership.alive(Role.TOKENIZER, now_s, model):
            return "no tokenizer answers"
        return ""

    def over(self, now_s: float, model: str = "") -> str:
        """What has been missing for so long that nobody need wait any more; empty if they may."""
        waits = now_s < self._served_s.get(model, -math.inf) + self._wait_s
        return "" if waits else self.missing(now_s, model)


def not_ready(reason: str) -> str:
    return f"The cluster cannot serve requests now: {reason}. Send it again."
