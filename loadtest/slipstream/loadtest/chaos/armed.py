"""Faults on call: a file arms one, and whoever commits it renames the file.

`injected/sitecustomize.py` is the other half: it runs in the services.
"""

from pathlib import Path

from slipstream.loadtest.chaos.stack import Stack

ANY = "any"
"""In place of a node id: whoever comes first; a role: the first one of it."""


class Armed(Stack):
    """Whole until something is armed."""

    @property
    def faults(self) -> Path:
        return self.base / "faults"

    def arm(self, node_id: str, fault: str, count: int = 1) -> None:
        """The next `count` occasions in this process are spoilt, no others; a gate that was open is
        shut."""
        self.shut_gate()
        folder = self.faults / node_id
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob(f"done.{fault}.*"), *folder.glob(f"{fault}.*")]:
            old.unlink(missing_ok=True)
        for number in range(count):
            (folder / f"{fault}.{number}").touch()

    def disarm(self) -> None:
        """What has not happened will not; what is held goes on."""
        for armed in self.faults.glob("*/*"):
            armed.unlink(missing_ok=True)
        for armed in self.faults.glob("*.on"):
            armed.unlink()
        if self.faults.exists():
            self.open_gate()

    def committed(self, node_id: str, fault: str) -> list[str]:
        """What was said of each time that it has happened since it was armed: who did it, to
        whom."""
        return [done.read_text() for done in (self.faults / node_id).glob(f"done.{fault}.*")]

    def switch(self, node_id: str, fault: str, value: str) -> None:
        """It happens at every occasion until `disarm`, or until it is switched to nothing."""
        self.faults.mkdir(exist_ok=True)
        named = self.faults / f"{node_id}.{fault}.on"
        if not value:
            return named.unlink(missing_ok=True)
        partial = self.faults / "partial"
        partial.write_text(value)
        partial.rename(named)

    def open_gate(self) -> None:
        """What is held goes on."""
        (self.faults / "gate").touch()

    def shut_gate(self) -> None:
        (self.faults / "gate").unlink(missing_ok=True)
