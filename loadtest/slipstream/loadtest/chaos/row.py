"""What a row of the catalogue says."""

import msgspec

from slipstream.loadtest.chaos.field import Scenario


class Row(msgspec.Struct, frozen=True):
    """A fault in a phase. It is run here, drawn by the simulator, or tried by tests; or `why` says
    why not."""

    id: str
    phase: str
    """Of a request: Q queued, T tokenising, P prefilling, X transfer, D decoding, F finishing."""
    fault: str
    seen: str
    """What a client may notice of it."""
    scenario: Scenario | None = None
    stack: str = "twins"
    may: tuple[str, ...] = ()
    """Codes of errors that answers may end with, and `broken` for connections."""
    tests: tuple[str, ...] = ()
    """`folder/file.py::test` below tests/."""
    sim: tuple[str, ...] = ()
    """Kinds of fault that tests/sim draws."""
    same: str = ""
    """The row whose scenario brings this fault about too."""
    why: str = ""
    """It does not apply."""

    @property
    def where(self) -> str:
        places = ["here"] * (self.scenario is not None)
        places += [f"with {self.same}"] * bool(self.same)
        places += [f"simulator: {', '.join(self.sim)}"] * bool(self.sim)
        return "; ".join([*places, *(f"`{test}`" for test in self.tests)]) or self.why
