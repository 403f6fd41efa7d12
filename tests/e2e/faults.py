"""A stack whose workers have faults on call, and what a test does with them."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from e2e.client import Answer
from e2e.stack import Stack, until
from slipstream.loadtest.chaos.armed import ANY, Armed

MIGRATED = "migrated"
PULL_TIMEOUT_S, LEASE_S, RENEW_S = 8.0, 2.5, 0.5


class FaultyStack(Stack, Armed):
    """Whole until a test arms something. Leases are short, so that outlasting one does not take
    long; READs may take longer than that."""

    def __init__(self, **settings: Any) -> None:
        environ = {
            "SLIPSTREAM_PULL_TIMEOUT_S": str(PULL_TIMEOUT_S),
            "SLIPSTREAM_LEASE_S": str(LEASE_S),
            "SLIPSTREAM_RENEW_S": str(RENEW_S),
        }
        super().__init__(environ=environ, locate_timeout_s=5.0, injected=True, **settings)

    def restrict(self, transport: str) -> None:
        """READs come by this one from now on."""
        self.switch(ANY, "transport", transport)

    def until_held(self, node_id: str, answered: Callable[[], bool] = lambda: False) -> bool:
        """Whether a READ is under way; it is not if there was none, and all is `answered`."""

        def decided() -> bool:
            return bool(self.committed(node_id, "hold")) or answered() or self._over()

        until(decided, "a READ under way")
        assert self.process.poll() is None, self.log
        return bool(self.committed(node_id, "hold"))

    def mute(self, node_id: str, wanted: bool) -> None:
        """Renewals of this worker are not sent."""
        self.switch(node_id, "mute", "on" if wanted else "")
        if not wanted:
            assert self.committed(node_id, "mute"), "there was nothing to renew"
            (self.faults / node_id / "done.mute.0").unlink()

    def failures(self, what: str, of: str = "") -> Counter[str]:
        """`what`_<cause>_total, by cause; `handover` or `fetch`; of all workers or of one, for what
        a worker has counted ends with its process. Among them the attempts that the scheduler gave
        up, for whoever notices a silence first acts on it."""
        found: Counter[str] = Counter()
        for (node_id, name), value in self.gauges().items():
            told = name.startswith(f"worker_{what}_") and name.endswith("_total")
            if told and of in ("", node_id):
                found[name.removeprefix(f"worker_{what}_").removesuffix("_total")] += int(value)
            if name == "scheduler_requests_migrated_total":
                found[MIGRATED] = int(value)
        return +found

    def reads(self, node_id: str, answers: Iterable[Answer]) -> Counter[str]:
        """How the transport ended this worker's READs for these, by cause; those that came are
        under the empty word."""
        wanted = tuple(f"{answer.id}-0/" for answer in answers)
        return Counter(
            fields["error"] or ""
            for _, name, fields in self.story(node_id)
            if name == "PullDone" and fields["pull_id"].startswith(wanted)
        )

    def _over(self) -> bool:
        return self.process.poll() is not None
