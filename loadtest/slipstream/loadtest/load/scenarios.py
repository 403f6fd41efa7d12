"""The scenarios: phases of a load, and who takes part in it. Pure."""

from collections.abc import Callable, Iterator
from random import Random

import msgspec

from slipstream.loadtest.load.settings import Settings

WARM_UP, CAPACITY = "warm-up", "capacity"


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """Either `users`, each asking anew when it has its answer, or requests that arrive by chance,
    whatever becomes of those before them."""

    name: str
    duration_s: float
    users: int = 0
    load: float = 0.0
    """Rate of arrivals, in capacities of the server."""
    judged: bool = True
    """By its times to first token; answers are judged in every phase."""


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the requests."""

    long: float = 0.0
    cancelled: float = 0.0
    slow: float = 0.0
    shared_prompt: bool = False
    turns: int = 1


class Scenario(msgspec.Struct, frozen=True):
    what: str
    phases: Callable[[Settings], list[Phase]]
    mix: Callable[[Settings], Mix] = lambda _: Mix()
    overload: str = ""
    """The phase in which some requests must be refused."""


def _open(*parts: tuple[str, float, float]) -> list[Phase]:
    return [Phase(name=name, duration_s=length_s, load=load) for name, length_s, load in parts]


def _users(settings: Settings) -> list[Phase]:
    return [Phase(name="users", duration_s=2 * settings.phase_s, users=settings.clients)]


SCENARIOS = {
    "steady": Scenario(
        "arrivals at --base-load",
        lambda s: _open(("steady", 2 * s.phase_s, s.base_load)),
    ),
    "step": Scenario(
        "arrivals at --base-load, at --step-load, and at --base-load again",
        lambda s: _open(
            ("before", s.phase_s, s.base_load),
            ("step", s.phase_s, s.step_load),
            ("after", s.phase_s, s.base_load),
        ),
        overload="step",
    ),
    "spike": Scenario(
        "arrivals at --base-load, for --spike-s at --spike-load, and at --base-load again",
        lambda s: _open(
            ("before", s.phase_s, s.base_load),
            ("spike", s.spike_s, s.spike_load),
            ("after", s.phase_s, s.base_load),
        ),
    ),
    "long-prompts": Scenario(
        "users, of whose prompts --long-share have --long-tokens",
        _users,
        lambda s: Mix(long=s.long_share),
    ),
    "shared-prompt": Scenario(
        "users with one system prompt of --shared-tokens",
        _users,
        lambda s: Mix(shared_prompt=True),
    ),
    "multi-turn": Scenario(
        "users, each in a conversation of --turns after another",
        _users,
        lambda s: Mix(turns=s.turns),
    ),
    "cancellations": Scenario(
        "users who leave --cancel-share of their answers at a token drawn by chance",
        _users,
        lambda s: Mix(cancelled=s.cancel_share),
    ),
    "slow-readers": Scenario(
        "users, of whom --slow-share read a few bytes at a time",
        _users,
        lambda s: Mix(slow=s.slow_share),
    ),
}


def phases(scenario: Scenario, settings: Settings) -> list[list[Phase]]:
    """Parts that follow each other when all answers of the one before have come; in each, phases
    that follow each other at once."""
    own = scenario.phases(settings)
    before = []
    if settings.warm_up_s:
        users = min(4, settings.clients)
        warm_up = Phase(name=WARM_UP, duration_s=settings.warm_up_s, users=users, judged=False)
        before.append([warm_up])
    if not settings.capacity_rps and any(phase.load for phase in own):
        measured_s, users = settings.capacity_s, settings.clients
        before.append([Phase(name=CAPACITY, duration_s=measured_s, users=users, judged=False)])
    return [*before, own]


def arrivals(part: list[Phase], capacity_rps: float, seed: int) -> Iterator[float]:
    """Seconds from the beginning of the part: a Poisson process with the rate of each phase."""
    draw = Random(f"{seed} arrivals")
    begin_s = 0.0
    for phase in part:
        end_s, at_s = begin_s + phase.duration_s, begin_s
        rate = phase.load * capacity_rps
        while rate and (at_s := at_s + draw.expovariate(rate)) < end_s:
            yield at_s
        begin_s = end_s
