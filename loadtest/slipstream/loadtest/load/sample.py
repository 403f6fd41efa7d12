"""What is kept of each request."""

from typing import Literal

import msgspec

Outcome = Literal["right", "left", "refused", "lost", "wrong", "error"]
"""`left`: by the client, on purpose. `lost`: accepted, and not ended as an answer ends. `wrong`:
ended, but not the right answer. `error`: no answer, and no proper refusal either."""
ACCEPTED: tuple[Outcome, ...] = ("right", "left", "lost", "wrong")
FAILURES: tuple[Outcome, ...] = ("lost", "wrong", "error")


class Sample(msgspec.Struct, kw_only=True):
    """Times in seconds from the beginning of the run."""

    phase: str
    prompt: str
    """Its name."""
    kind: str
    attempt: int
    planned_s: float
    """When it was to be sent: of an arrival its time, otherwise when it was sent."""
    sent_s: float
    end_s: float = 0.0
    times_s: list[float] = []
    """When pieces of text came."""
    outcome: Outcome = "lost"
    problem: str = ""
    refused_finally: bool = False
    """The client has given up."""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def accepted(self) -> bool:
        return self.outcome in ACCEPTED

    @property
    def ttft_s(self) -> float | None:
        return self.times_s[0] - self.sent_s if self.times_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between pieces of text; none of a slow reader, who makes them itself."""
        if self.kind == "slow":
            return []
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]
