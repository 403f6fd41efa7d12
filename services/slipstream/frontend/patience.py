"""Whether requests are taken: while the cluster can serve them, and for a while after.

A process that is started anew is away for seconds. Who comes then waits for it, instead of being
sent away: so one service after the other can be replaced while requests run.
"""

import math

from slipstream.core.machine import Event, Received
from slipstream.core.membership import Membership
from slipstream.messages import Peers
from slipstream.types import Role


class Patience:
    def __init__(self, membership: Membership, recovery_wait_s: float) -> None:
        self._membership, self._wait_s = membership, recovery_wait_s
        self._served_s = -math.inf
        """When the cluster was last known to be whole."""

    def before(self, event: Event, now_s: float) -> None:
        """To be told of every event before anybody else is: it may end what is true now."""
        seldom = not isinstance(event, Received) or isinstance(event.message, Peers)
        if seldom and not self.missing(now_s):
            self._served_s = now_s

    def missing(self, now_s: float) -> str:
        """To serve a request now, in words; empty if nothing is."""
        membership = self._membership
        if not membership.ready:
            return membership.reason or "the cluster is starting"
        if not membership.scheduler_up:
            return "the scheduler is silent"
        if not membership.alive(Role.TOKENIZER, now_s):
            return "no tokenizer answers"
        return ""

    def over(self, now_s: float) -> str:
        """What has been missing for so long that nobody need wait any more; empty if they may."""
        waits = now_s < self._served_s + self._wait_s
        return "" if waits else self.missing(now_s)


def not_ready(reason: str) -> str:
    return f"The cluster cannot serve requests now: {reason}. Send it again."
