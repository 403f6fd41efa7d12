"""What clients have used, at several frontends: nothing counts twice, nothing that one which lives
has counted is lost, and limits hold within what is said of them."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from frontend.usages import Accounts
from slipstream.frontend.api_keys import ApiKey
from slipstream.frontend.callers import Client
from slipstream.frontend.problems import ApiError
from slipstream.frontend.usage import (
    EXCHANGE_S,
    MONTHS_KEPT,
    Account,
    Kind,
    Ledger,
    Used,
    minute,
    month,
)

TENANTS, MODELS = ("a", "b", "c"), ("m", "n")


@dataclass
class Frontend:
    """Ledger and clients of one life of a process."""

    name: str
    accounts: Accounts
    clock: Callable[[], float]
    wall_s: float
    """By which its own clock is wrong."""
    keys: list[ApiKey]
    counted: dict[str, list[int]] = field(default_factory=dict)
    applied: dict[str, list[int]] = field(default_factory=dict)
    """Of what it has counted, what the store has had."""
    next_s: float = 0.0

    def __post_init__(self) -> None:
        now_s = self.clock()
        self.ledger = Ledger(self.accounts.unix_s + self.wall_s, now_s)
        self.clients = {key.name: Client(key, self.ledger, self.clock) for key in self.keys}
        self.counted = {tenant: [0] * len(Kind) for tenant in self.clients}
        self.applied = {tenant: [0] * len(Kind) for tenant in self.clients}

    def ask(self, tenant: str, model: str, prompt: int, made: int, frontends: int) -> bool:
        client, counted = self.clients[tenant], self.counted[tenant]
        try:
            with client.working(frontends) as trail:
                trail.begin("id", model, None)
                counted[Kind.REQUESTS] += 1
                for kind, amount in ((Kind.PROMPT_TOKENS, prompt), (Kind.COMPLETION_TOKENS, made)):
                    client.spend(model, kind, amount)
                    counted[kind] += amount
        except ApiError:
            counted[Kind.REFUSED] += 1
            return False
        return True

    def exchange(self, way: str = "both") -> None:
        """`way`: as far as it goes: none, there, both."""
        now_s = self.clock()
        writes = self.ledger.due(now_s)
        said = self.accounts.exchange(self.name, writes) if way != "none" else []
        if way != "none":
            self.applied = {tenant: row[:] for tenant, row in self.counted.items()}
        if way != "both":
            self.ledger.failed(writes)
            return
        for tenant, used in self.ledger.heard(writes, said, self.accounts.unix_s, now_s).items():
            self.clients[tenant].share(used, now_s)

    def knows(self, tenant: str, *, asks: bool = False) -> list[int]:
        """Of all months, its own and the others'. `asks`: the store, before."""
        accounts = self.ledger.past(tenant, self.clock())
        if asks:
            writes = [account.write() for account in accounts]
            said = self.accounts.exchange(self.name, writes)
            self.ledger.heard(writes, said, self.accounts.unix_s, self.clock())
        rows = [row for account in accounts for row in account.rows().values()]
        return [sum(row[kind] for row in rows) for kind in Kind]


class World:
    def __init__(self, seed: int, frontends: int, keys: list[ApiKey]) -> None:
        self.rng, self.now_s, self.accounts = random.Random(seed), 1000.0, Accounts()
        self.keys, self.number = keys, 0
        self.living = [self.born() for _ in range(frontends)]
        self.dead: list[Frontend] = []
        self.flushed = False

    def born(self) -> Frontend:
        self.number += 1
        wrong_s = self.rng.choice([0.0, 0.0, 5.0, -40.0, 7200.0])
        name = f"frontend-{self.number}.{self.number}"
        return Frontend(name, self.accounts, lambda: self.now_s, wrong_s, self.keys)

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds
        self.accounts.unix_s += seconds

    def stored(self, tenant: str) -> list[int]:
        kept = self.accounts.kept.items()
        lives = [life for (of, name), lives in kept if of == tenant and len(name) == 7
                 for life in lives.values()]  # fmt: skip
        rows = [row for life in lives for row in life.values()]
        return [sum(row[kind] for row in rows) for kind in Kind]

    def counted(self, tenant: str) -> Iterator[list[int]]:
        yield from (life.counted[tenant] for life in (*self.living, *self.dead))


def total(rows: Iterator[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def step(world: World) -> None:
    rng = world.rng
    world.pass_(rng.expovariate(3.0))
    frontend = rng.choice(world.living)
    for one in world.living:
        if world.now_s >= one.next_s:
            one.exchange(rng.choice(["both", "both", "both", "there", "none"]))
            one.next_s = world.now_s + EXCHANGE_S
    match rng.randrange(60):
        case 0:
            world.living.remove(frontend)
            world.dead.append(frontend)
            world.living.append(world.born())
        case 1:
            world.accounts.kept.clear()
            world.flushed = True
        case 2:
            world.accounts.unix_s += rng.choice([-90.0, 3.0, 3600.0])
        case 3:
            now = month(world.accounts.unix_s)
            world.accounts.unix_s = now.end_s - rng.random()
        case _:
            prompt, made = rng.randrange(100), rng.randrange(50)
            tenant, model = rng.choice(TENANTS), rng.choice(MODELS)
            frontend.ask(tenant, model, prompt, made, len(world.living))


@pytest.mark.parametrize("seed", range(60))
def test_nothing_twice_and_nothing_lost(seed: int) -> None:
    keys = [ApiKey(name=name, sha256="0" * 64) for name in TENANTS]
    world = World(seed, 3, keys)
    for _ in range(400):
        step(world)
        tenant = world.rng.choice(TENANTS)
        most = total(world.counted(tenant))
        for found in (world.stored(tenant), world.rng.choice(world.living).knows(tenant)):
            assert all(a <= b for a, b in zip(found, most, strict=True))
    # A clock that was set back has left numbers in what is a later month now.
    world.accounts.unix_s = month(world.accounts.unix_s).end_s + 1.0
    for _ in range(4):  # what was flushed is noticed, said again, and heard by all
        world.pass_(EXCHANGE_S)
        for one in world.living:
            one.exchange()
    for tenant in TENANTS:
        living = total(one.counted[tenant] for one in world.living)
        dead = total(one.applied[tenant] for one in world.dead) if world.dead else [0] * len(Kind)
        whole = [a + b for a, b in zip(living, dead, strict=True)]
        stored = world.stored(tenant)
        assert all(a >= b for a, b in zip(stored, living, strict=True))
        assert world.flushed or stored == whole
        for one in world.living:
            assert all(a >= b for a, b in zip(one.knows(tenant, asks=True), stored, strict=True))


# --- Limits ---------------------------------------------------------------------------------------


def greedy(world: World, seconds: float, down: tuple[float, float] = (0.0, 0.0)) -> int:
    """A client that asks everywhere all the time: what it was granted."""
    granted, begun_s = 0, world.now_s
    for one in world.living:
        one.next_s = begun_s + world.rng.random() * EXCHANGE_S
    while (at_s := world.now_s - begun_s) < seconds:
        world.pass_(0.05)
        for one in world.rng.sample(world.living, len(world.living)):
            if world.now_s >= one.next_s:
                one.exchange("none" if down[0] <= at_s < down[1] else "both")
                one.next_s = world.now_s + EXCHANGE_S
            granted += one.ask("a", "m", 5, 5, len(world.living))
    return granted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("frontends", [1, 2, 5])
@pytest.mark.parametrize("down", [(0.0, 0.0), (40.0, 100.0)])
def test_of_minutes(seed: int, frontends: int, down: tuple[float, float]) -> None:
    """Less than a limit too much, once, and one for each frontend."""
    limit, seconds = 120, 180.0
    world = World(seed, frontends, [ApiKey(name="a", sha256="0" * 64, requests_per_minute=limit)])
    granted = greedy(world, seconds, down)
    exact = limit * (1 + seconds / 60)
    assert granted <= exact + limit * (frontends - 1) / frontends + frontends
    assert granted >= limit * seconds / 60 * 0.95, "and it gets what it may"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("frontends", [1, 2, 5])
@pytest.mark.parametrize("down", [(0.0, 0.0), (2.0, 1000.0), (0.0, 1000.0)])
def test_of_months(seed: int, frontends: int, down: tuple[float, float]) -> None:
    """Too much is what the others grant between two exchanges; without a store it is nothing."""
    limit = 2000
    world = World(seed, frontends, [ApiKey(name="a", sha256="0" * 64, requests_per_month=limit)])
    granted = greedy(world, 120.0, down)
    in_flight = 20 * (frontends - 1) * 2 * EXCHANGE_S  # each asks 20 times a second
    assert limit - frontends <= granted <= limit + in_flight
    if down[0] == 0.0 < down[1]:
        assert granted <= limit + frontends
    world.accounts.unix_s = month(world.accounts.unix_s).end_s + 1.0
    for one in world.living:
        one.exchange()
    assert world.living[0].ask("a", "m", 1, 1, frontends), "another month"


def test_one_that_is_new_knows_what_was_used() -> None:
    key = ApiKey(name="a", sha256="0" * 64, requests_per_minute=10, tokens_per_month=100)
    world = World(0, 1, [key])
    world.living[0].exchange()
    for _ in range(5):
        assert world.living[0].ask("a", "m", 5, 15, 2)
    world.living[0].exchange()
    new = world.born()
    new.exchange()
    assert not new.ask("a", "m", 1, 1, 2), "100 tokens of the month"
    new.exchange()
    account = new.clients["a"].meter.minute(world.now_s)
    assert account.used() == Used(5, 100), "the refused one is no request"


# --- Parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unix_s", "name", "seconds"),
    [
        (0, "1970-01", 31 * 86_400),
        (1_709_164_800, "2024-02", 29 * 86_400),
        (1_798_761_599.9, "2026-12", 31 * 86_400),
        (1_798_761_600, "2027-01", 31 * 86_400),
    ],
)
def test_months_are_the_calendar_s(unix_s: float, name: str, seconds: int) -> None:
    found = month(unix_s)
    assert found.name == name and found.end_s - found.start_s == seconds
    assert found.start_s <= unix_s < found.end_s and found.is_month
    before = month(unix_s, 1)
    assert before.end_s == found.start_s and month(unix_s, 12).name[-2:] == name[-2:]
    now = minute(unix_s)
    assert now.start_s <= unix_s < now.end_s and now.name.startswith(name) and not now.is_month


def test_months_that_are_over_are_kept_for_a_year() -> None:
    world = World(0, 1, [ApiKey(name="a", sha256="0" * 64)])
    (one,) = world.living
    for _ in range(MONTHS_KEPT + 2):
        one.ask("a", "m", 1, 1, 1)
        one.exchange()
        world.pass_(month(world.accounts.unix_s).end_s - world.accounts.unix_s)
        one.exchange()
    past = one.ledger.past("a", world.now_s)
    assert [bool(account.own) for account in past] == [False] + [True] * (MONTHS_KEPT - 1)
    assert not one.ledger.meter("a").minute(world.now_s).own, "minutes are not"


def test_what_the_store_has_lost_of_the_idle_is_said_again() -> None:
    """Nobody asks for anything any more; the store has lost one account, or all of them."""
    keys = [ApiKey(name=f"k{n}", sha256="0" * 64) for n in range(200)]
    world = World(0, 1, keys)
    (one,) = world.living
    for key in keys:
        one.ask(key.name, "m", 7, 3, 1)
    one.exchange("none")
    world.pass_(120.0)
    one.exchange()
    assert len([key for key in world.accounts.kept if len(key[1]) == 7]) == len(keys)
    world.pass_(3600.0)
    one.exchange()
    whole = {key: lives for key, lives in world.accounts.kept.items() if len(key[1]) == 7}
    del world.accounts.kept["k77", month(world.accounts.unix_s).name]
    for _ in range(5):  # SWEEP of them each time
        world.pass_(EXCHANGE_S)
        one.exchange()
    assert all(world.accounts.kept[key] == lives for key, lives in whole.items())
    world.accounts.kept.clear()
    for _ in range(2):
        world.pass_(EXCHANGE_S)
        one.exchange()
    assert all(world.accounts.kept[key] == lives for key, lives in whole.items())


def test_an_account_never_knows_less_than_before() -> None:
    account = Account("a", month(0))
    assert account.hear({"m": [5, 0, 10, 0, 10]}) == Used(5, 20)
    assert account.hear({"m": [2, 0, 4, 0, 4], "n": [1, 0, 0, 0, 1]}) == Used(1, 1)
    assert account.used() == Used(6, 21)


@pytest.mark.parametrize("end", ["failed", "nothing"])
def test_what_is_counted_during_an_exchange_is_said_by_the_next(end: str) -> None:
    ledger = Ledger(0.0, 0.0)
    meter = ledger.meter("a")
    writes = ledger.due(0.0)
    assert not any(write.rows for write in writes), "questions"
    meter.count("m", Kind.REQUESTS, 1, 0.0)
    if end == "failed":
        ledger.failed(writes)
    else:
        ledger.heard(writes, [None] * len(writes), 0.0, 0.0)
    assert meter.month(0.0).dirty
