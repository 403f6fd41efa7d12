"""A stack whose workers have faults on call, and what a test does with them.

`injected/sitecustomize.py` is the other half: it runs in the workers.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e2e.client import Answer
from e2e.stack import Stack, until

INJECTED = Path(__file__).parent / "injected"
MIGRATED = "migrated"
PULL_TIMEOUT_S, LEASE_S, RENEW_S = 8.0, 2.5, 0.5


class FaultyStack(Stack):
    """Whole until a test arms something. Leases are short, so that outlasting one does not take
    long; READs may take longer than that."""

    def __init__(self, **settings: Any) -> None:
        self.faults = Path(tempfile.mkdtemp(prefix="e2e-faults-", dir="/tmp"))
        environ = {
            "PYTHONPATH": os.pathsep.join([str(INJECTED), *filter(None, sys.path)]),
            "E2E_FAULTS": str(self.faults),
            "SLIPSTREAM_PULL_TIMEOUT_S": str(PULL_TIMEOUT_S),
            "SLIPSTREAM_LEASE_S": str(LEASE_S),
            "SLIPSTREAM_RENEW_S": str(RENEW_S),
        }
        super().__init__(environ=environ, locate_timeout_s=5.0, **settings)

    def kill(self) -> None:
        super().kill()
        shutil.rmtree(self.faults, ignore_errors=True)

    def arm(self, node_id: str, fault: str, count: int = 1) -> None:
        """The next `count` occasions in this worker are spoilt; a gate that was open is shut."""
        (self.faults / "gate").unlink(missing_ok=True)
        folder = self.faults / node_id
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"done.{fault}.*"):
            old.unlink()
        for number in range(count):
            (folder / f"{fault}.{number}").touch()

    def committed(self, node_id: str, fault: str) -> int:
        """How often it has happened since it was armed."""
        return len(list((self.faults / node_id).glob(f"done.{fault}.*")))

    def restrict(self, transport: str) -> None:
        """READs come by this one from now on."""
        partial = self.faults / "partial"
        partial.write_text(transport)
        partial.rename(self.faults / "transport")

    def until_held(self, node_id: str) -> None:
        until(lambda: self.committed(node_id, "hold") or self._over(), "a READ under way")
        assert self.process.poll() is None, self.log

    def open_gate(self) -> None:
        """What is held goes on."""
        (self.faults / "gate").touch()

    def mute(self, node_id: str, wanted: bool) -> None:
        """Renewals of this worker are not sent."""
        folder = self.faults / node_id
        folder.mkdir(exist_ok=True)
        if wanted:
            (folder / "mute").touch()
        else:
            (folder / "mute").unlink()
            assert (folder / "done.mute").exists(), "there was nothing to renew"
            (folder / "done.mute").unlink()

    def signal(self, node_id: str, number: signal.Signals) -> None:
        os.kill(self.pids()[node_id], number)

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
