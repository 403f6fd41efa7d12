"""What each client has used, minute by minute and month by month, at all frontends together.

Each frontend owns the numbers that it has counted itself, says them as they stand and not by how
much they grew, and is told the sum of the others'. So nothing that is said twice, late or again
after a loss counts twice, and nobody waits for anybody. Pure: time is told, and what is to be said
and was heard goes through `usage_sync`.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import NamedTuple

MONTHS_KEPT = 13
"""This one and the year before it."""
LATE_S = 3.0
"""How long after the end of a period others may still say something of it."""
ACTIVE_S = 60.0
"""Whoever has asked for something within that time is looked after with every exchange."""
SWEEP = 64
"""Of all others so many with each exchange, in turn: what the store has lost comes back."""
EXCHANGE_S = 1.0
"""Between two exchanges with the store."""
STALE_S = 3.0
"""After such a silence of the store each frontend is for itself."""
MINUTE_TTL_S = 180.0


class Kind(IntEnum):
    """Of what is counted; the place of its number in a row."""

    REQUESTS = 0
    REFUSED = 1
    """Over the limits of the key."""
    PROMPT_TOKENS = 2
    CACHED_TOKENS = 3
    """Of the prompts' tokens."""
    COMPLETION_TOKENS = 4


Row = list[int]
"""By kind."""
Rows = dict[str, Row]
"""Model, as it was asked for -> row; empty: what asked for none, or never got as far."""


class Used(NamedTuple):
    """What limits look at."""

    requests: int
    tokens: int

    @staticmethod
    def of(rows: Rows) -> "Used":
        """Cached tokens are tokens of the prompt."""
        requests = sum(row[Kind.REQUESTS] for row in rows.values())
        tokens = sum(row[Kind.PROMPT_TOKENS] + row[Kind.COMPLETION_TOKENS] for row in rows.values())
        return Used(requests, tokens)


def added(*summands: Mapping[str, Sequence[int]]) -> Rows:
    total: Rows = {}
    for rows in summands:
        for model, row in rows.items():
            known = total.setdefault(model, [0] * len(Kind))
            for kind, amount in enumerate(row):
                known[kind] += amount
    return total


# --- Time -----------------------------------------------------------------------------------------


class Period(NamedTuple):
    """A minute or a month of the calendar, in UTC."""

    name: str
    """`2026-11-22T18:05` or `2026-11`, as it stands in the store."""
    start_s: int
    end_s: int

    @property
    def is_month(self) -> bool:
        return len(self.name) == len("2026-11")


def minute(unix_s: float) -> Period:
    start_s = int(unix_s // 60) * 60
    return Period(f"{datetime.fromtimestamp(start_s, UTC):%Y-%m-%dT%H:%M}", start_s, start_s + 60)


def month(unix_s: float, ago: int = 0) -> Period:
    """`ago`: so many months before."""
    first = datetime.fromtimestamp(unix_s, UTC).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    for _ in range(ago):
        first = (first - timedelta(days=1)).replace(day=1)
    after = (first + timedelta(days=31)).replace(day=1)
    return Period(f"{first:%Y-%m}", int(first.timestamp()), int(after.timestamp()))


# --- Accounts -------------------------------------------------------------------------------------


class Account:
    """One client's numbers of one period."""

    __slots__ = ("dirty", "others", "own", "period", "tenant", "told", "written")

    def __init__(self, tenant: str, period: Period) -> None:
        self.tenant, self.period = tenant, period
        self.own: Rows = {}
        self.others: Rows = {}
        """As the store said last, and never less than it said before."""
        self.told = Used(0, 0)
        """Of our own, what the others may know."""
        self.dirty = False
        self.written = False
        """The store has had a row of ours."""

    def count(self, model: str, kind: Kind, amount: int) -> None:
        row = self.own.get(model)
        if row is None:
            row = self.own[model] = [0] * len(Kind)
        row[kind] += amount
        self.dirty = True

    def rows(self) -> Rows:
        return added(self.own, self.others)

    def used(self, parts: int = 1) -> Used:
        """`parts`: of so many frontends each is taken to have used as much as we have since the
        store was heard of."""
        own, others = Used.of(self.own), Used.of(self.others)
        since = zip(others, self.told, own, strict=True)
        return Used(*(said + told + (now - told) * parts for said, told, now in since))

    def write(self) -> "Write":
        self.dirty = False
        rows = {model: row[:] for model, row in self.own.items()}
        return Write(self, rows, Used.of(rows))

    def hear(self, others: Mapping[str, Sequence[int]]) -> Used:
        """By how much they grew."""
        before = Used.of(self.others)
        for model, row in others.items():
            known = self.others.setdefault(model, [0] * len(Kind))
            known[:] = map(max, known, row)
        after = Used.of(self.others)
        return Used(after.requests - before.requests, after.tokens - before.tokens)


class Write(NamedTuple):
    """What the store is told of one account, all of ours as it stands, and asked for the rest."""

    account: Account
    rows: Rows
    """A copy; empty: there is only a question."""
    used: Used

    @property
    def ttl_s(self) -> float:
        """0: for good. A key that lapses by itself may be evicted before its time."""
        return 0.0 if self.account.period.is_month else MINUTE_TTL_S


class Said(NamedTuple):
    """What the store says of one account, `Write` by `Write`."""

    ours: bool
    """It had a row of ours before."""
    others: Mapping[str, Sequence[int]]


class Meter:
    """One client's, for who counts."""

    __slots__ = ("_ledger", "_minute", "_month", "seen_s", "tenant", "totals", "until_s")

    def __init__(self, ledger: "Ledger", tenant: str) -> None:
        self._ledger, self.tenant = ledger, tenant
        self.until_s = self.seen_s = -math.inf
        """Until when, by the host's clock, minute and month are these; when it was last asked."""
        self.totals: Rows = {}
        """Since the start of this process."""

    def count(self, model: str, kind: Kind, amount: int, now_s: float) -> None:
        """Called for every token."""
        self._see(now_s)
        self._minute.count(model, kind, amount)
        self._month.count(model, kind, amount)
        row = self.totals.get(model)
        if row is None:
            row = self.totals[model] = [0] * len(Kind)
        row[kind] += amount

    def month(self, now_s: float) -> Account:
        self._see(now_s)
        return self._month

    def minute(self, now_s: float) -> Account:
        self._see(now_s)
        return self._minute

    def _see(self, now_s: float) -> None:
        self.seen_s = now_s
        if now_s >= self.until_s:
            unix_s = self._ledger.unix_s(now_s)
            now = minute(unix_s)
            self._minute = self._ledger.account(self.tenant, now)
            self._month = self._ledger.account(self.tenant, month(unix_s))
            self.until_s = now_s + now.end_s - unix_s


class Ledger:
    """One frontend's. Its time is the store's, once that was heard: frontends whose clocks differ
    have the same minute, and a clock that is set moves nothing."""

    def __init__(self, unix_s: float, now_s: float) -> None:
        """The two clocks as they stand together: the wall's, the host's."""
        self._offset_s = unix_s - now_s
        self._accounts: dict[tuple[str, str], Account] = {}
        self._meters: dict[str, Meter] = {}
        self._heard_s = -math.inf
        self._swept = 0

    def unix_s(self, now_s: float) -> float:
        return now_s + self._offset_s

    def shared(self, now_s: float) -> bool:
        """Whether what the others have used is known, as of a few seconds ago."""
        return now_s < self._heard_s + STALE_S

    def meter(self, tenant: str) -> Meter:
        found = self._meters.get(tenant)
        if found is None:
            found = self._meters[tenant] = Meter(self, tenant)
        return found

    def meters(self) -> Iterator[Meter]:
        yield from self._meters.values()

    def keep(self, tenants: Collection[str]) -> None:
        """The others are gone; what they have used is still said."""
        self._meters = {t: meter for t, meter in self._meters.items() if t in tenants}

    def account(self, tenant: str, period: Period) -> Account:
        key = tenant, period.name
        found = self._accounts.get(key)
        if found is None:
            found = self._accounts[key] = Account(tenant, period)
        return found

    def past(self, tenant: str, now_s: float) -> list[Account]:
        """The months that are kept, the newest first; what is not known here is empty."""
        unix_s = self.unix_s(now_s)
        periods = [month(unix_s, ago) for ago in range(MONTHS_KEPT)]
        known = self._accounts.get
        return [known((tenant, one.name)) or Account(tenant, one) for one in periods]

    # --- The exchange with the store ---

    def due(self, now_s: float) -> list[Write]:
        """What to say, and to ask, now. Each ends in `heard` or `failed`."""
        unix_s = self.unix_s(now_s)
        self._forget(unix_s)
        wanted = [account for account in self._accounts.values() if account.dirty]
        for meter in self._meters.values():
            if now_s < meter.seen_s + ACTIVE_S:
                wanted += [self.account(meter.tenant, period) for period in _open(unix_s)]
        wanted += self._sweep(unix_s)
        return [account.write() for account in dict.fromkeys(wanted)]

    def failed(self, writes: Iterable[Write]) -> None:
        for write in writes:
            write.account.dirty |= bool(write.rows)

    def heard(
        self, writes: Sequence[Write], said: Sequence[Said | None], unix_s: float, now_s: float
    ) -> dict[str, Used]:
        """What the others have used up of this minute since they were heard of last, by client.
        `said`: None for what the store cannot say; `unix_s`: its clock."""
        self._offset_s, self._heard_s = unix_s - now_s, now_s
        for meter in self._meters.values():
            meter.until_s = -math.inf
        news: dict[str, Used] = {}
        lost = False
        for write, answer in zip(writes, said, strict=True):
            account = write.account
            if answer is None:
                account.dirty |= bool(write.rows)
                continue
            lost = lost or (account.written and not answer.ours)
            account.written = account.written or bool(write.rows)
            account.told = write.used
            grew = account.hear(answer.others)
            if not account.period.is_month:
                known = news.get(account.tenant, Used(0, 0))
                news[account.tenant] = Used(*map(sum, zip(known, grew, strict=True)))
        if lost:  # then likely everything was: what was said is said again
            for account in self._accounts.values():
                account.dirty = bool(account.own)
        return news

    def _sweep(self, unix_s: float) -> list[Account]:
        now = month(unix_s)
        for tenant in self._meters:
            self.account(tenant, now)
        months = [account for account in self._accounts.values() if account.period.is_month]
        count = min(SWEEP, len(months))
        turn = list(itertools.islice(itertools.cycle(months), self._swept, self._swept + count))
        self._swept = (self._swept + count) % max(1, len(months))
        return turn

    def _forget(self, unix_s: float) -> None:
        """By number and not by age: a clock that leaps forward and back takes nothing along."""
        months = sorted({a.period.name for a in self._accounts.values() if a.period.is_month})
        oldest = months[-MONTHS_KEPT:][0] if months else ""
        self._accounts = {
            key: account
            for key, account in self._accounts.items()
            if (
                account.period.name >= oldest
                if account.period.is_month
                else unix_s < account.period.end_s + MINUTE_TTL_S
            )
        }


def _open(unix_s: float) -> Iterator[Period]:
    """Periods of which something new may be heard."""
    for find in (minute, month):
        now = find(unix_s)
        yield now
        if unix_s < now.start_s + LATE_S:
            yield find(now.start_s - 1)
