"""What may go wrong in one run, drawn from its seed, and the count of what did."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

KINDS = (
    "loss",
    "delay",
    "duplication",
    "partition",
    "crash",
    "pause",
    "slow",
    "lie",
    "corruption",
    "step_failure",
    "hang",
    "store_outage",
    "drain",
    "poison",
)
"""`reordering` is counted too: it follows from delay."""


@dataclass
class Faults:
    """The draw for one seed: which kinds happen, how often, and until when."""

    rng: Random
    active: set[str] = field(default_factory=set)
    until_s: float = 8.0
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def draw(cls, rng: Random) -> "Faults":
        active = {kind for kind in KINDS if rng.random() < 0.35}
        if rng.random() < 0.05:
            active = {"poison", "corruption", "store_outage"}  # no worker is lost by anything else
        return cls(rng, active, until_s=rng.uniform(2.0, 10.0))

    def strikes(self, kind: str, probability: float, now_s: float) -> bool:
        """Whether a fault of this kind happens at this opportunity; counts it."""
        if kind not in self.active or now_s >= self.until_s or self.rng.random() >= probability:
            return False
        self.counts[kind] += 1
        return True
