"""How much one client may ask for: requests and tokens in a minute and in a month, requests at a
time."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.usage import EXCHANGE_S, STALE_S, Period, Used

MINUTE_S = 60.0


class Allowance(NamedTuple):
    """0: none."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0


class Bucket:
    """Fills up in a minute, and holds no more than that. What is taken may be more than is there:
    then it takes longer."""

    __slots__ = ("_at_s", "_level", "limit")

    def __init__(self, limit: int, now_s: float) -> None:
        self.limit, self._level, self._at_s = limit, float(limit), now_s

    def resize(self, limit: int, now_s: float) -> None:
        """What was taken remains taken."""
        level = self.level(now_s)
        self._level = min(float(limit), level + max(0, limit - self.limit))
        self.limit = limit

    def level(self, now_s: float) -> float:
        grown = (now_s - self._at_s) * self.limit / MINUTE_S
        self._level, self._at_s = min(float(self.limit), self._level + grown), now_s
        return self._level

    def take(self, amount: float, now_s: float) -> None:
        self._level = self.level(now_s) - amount

    def fill(self, level: float, now_s: float) -> None:
        self._level, self._at_s = min(float(self.limit), level), now_s

    def left(self, now_s: float) -> int:
        return max(0, math.floor(self.level(now_s)))

    def wait_s(self, amount: float, now_s: float) -> float:
        """Until so much is there."""
        return max(0.0, amount - self.level(now_s)) * MINUTE_S / self.limit


class Limit:
    """So many a minute, of all frontends together. This one grants its part; whenever it hears what
    the others have taken, its part is that of what is left."""

    __slots__ = ("_part", "_parts", "_shared_s", "_whole", "limit")

    def __init__(self, limit: int, parts: int, now_s: float) -> None:
        self._shared_s = -math.inf
        self._whole, self._part = Bucket(limit, now_s), Bucket(-(-limit // parts), now_s)
        self.limit, self._parts = limit, parts

    def resize(self, limit: int, parts: int, now_s: float) -> None:
        self._whole.resize(limit, now_s)
        self._part.resize(-(-limit // parts), now_s)
        self.limit, self._parts = limit, parts

    def take(self, amount: int, now_s: float) -> None:
        self._whole.take(amount, now_s)
        self._part.take(amount, now_s)

    def share(self, others: int, now_s: float) -> None:
        """What the others have taken since the last time."""
        self._shared_s = now_s
        self._whole.take(others, now_s)
        left = self._whole.level(now_s)
        # Of less than one for each, each may have one.
        self._part.fill(left if left < 1 else max(1.0, left / self._parts), now_s)

    def shown(self, now_s: float) -> Bucket:
        return self._whole if now_s < self._shared_s + STALE_S else self._part

    def wait_s(self, now_s: float) -> float:
        """Until one more is granted."""
        wait_s = self._part.wait_s(1, now_s)
        if wait_s and now_s < self._shared_s + STALE_S:
            wait_s = max(self._whole.wait_s(1, now_s), min(wait_s, EXCHANGE_S))
        return wait_s


class Quota:
    """One client's account. `begin` before each request, `end` after it, `spend` as tokens come."""

    def __init__(self, limits: Allowance, now_s: float, parts: int = 1) -> None:
        """`parts`: frontends, each of which grants its part."""
        self._requests = Limit(limits.requests_per_minute, parts, now_s)
        self._tokens = Limit(limits.tokens_per_minute, parts, now_s)
        self._max_concurrent = -(-limits.max_concurrent // parts)
        self.running = 0

    def resize(self, limits: Allowance, now_s: float, parts: int = 1) -> None:
        self._requests.resize(limits.requests_per_minute, parts, now_s)
        self._tokens.resize(limits.tokens_per_minute, parts, now_s)
        self._max_concurrent = -(-limits.max_concurrent // parts)

    def share(self, requests: int, tokens: int, now_s: float) -> None:
        """What the client has used at other frontends since the last time."""
        if self._requests.limit:
            self._requests.share(requests, now_s)
        if self._tokens.limit:
            self._tokens.share(tokens, now_s)

    def refusal(self, name: str, now_s: float) -> Problem | None:
        """Why `name` may not begin another one now."""
        for what, limit in (("requests", self._requests), ("tokens", self._tokens)):
            if limit.limit and (wait_s := limit.wait_s(now_s)):
                number = limit.shown(now_s).limit
                return _refused(name, f"{number} {what} per minute are used up", wait_s)
        if 0 < self._max_concurrent <= self.running:
            return _refused(name, f"{self.running} requests run, which is the limit", 1.0)
        return None

    def begin(self, now_s: float) -> None:
        self.running += 1
        if self._requests.limit:
            self._requests.take(1, now_s)

    def end(self) -> None:
        self.running -= 1

    def spend(self, tokens: int, now_s: float) -> None:
        """Of a prompt once their number is known, of an answer as they are made."""
        if self._tokens.limit:
            self._tokens.take(tokens, now_s)

    def limits(self, now_s: float) -> Iterator[tuple[str, int, int, float]]:
        """(name, limit, what is left, seconds until all of it is there), as far as it is known;
        nothing of what has no limit."""
        for name, limit in (("requests", self._requests), ("tokens", self._tokens)):
            if limit.limit:
                bucket = limit.shown(now_s)
                yield name, bucket.limit, bucket.left(now_s), bucket.wait_s(bucket.limit, now_s)


class MonthQuota(NamedTuple):
    """Of a calendar month. 0: no limit."""

    requests: int = 0
    tokens: int = 0

    def refusal(self, name: str, used: Used, period: Period, unix_s: float) -> Problem | None:
        for what, limit, spent in self._limits(used):
            if spent >= limit:
                end = datetime.fromtimestamp(period.end_s, UTC)
                return Problem(
                    code=ErrorCode.QUOTA,
                    message=f"The API key '{name}' has used up its {limit} {what} of this month, "
                    f"which ends {end:%Y-%m-%dT%H:%MZ}. Ask for a larger quota, or wait for that.",
                    retry_after_s=max(1.0, period.end_s - unix_s),
                )
        return None

    def limits(
        self, used: Used, period: Period, unix_s: float
    ) -> Iterator[tuple[str, int, int, float]]:
        """As `Quota.limits`."""
        for what, limit, spent in self._limits(used):
            yield f"{what}-month", limit, max(0, limit - spent), max(0.0, period.end_s - unix_s)

    def _limits(self, used: Used) -> Iterator[tuple[str, int, int]]:
        for what, limit, spent in zip(Used._fields, self, used, strict=True):
            if limit:
                yield what, limit, spent


def _refused(name: str, why: str, wait_s: float) -> Problem:
    return Problem(
        code=ErrorCode.RATE_LIMIT,
        message=f"The API key '{name}' is at its limit: {why}. Try again in {math.ceil(wait_s)} s.",
        retry_after_s=wait_s,
    )


def duration(seconds: float) -> str:
    """`120ms`, `7.66s`, `1m30s`: up to a millisecond later than it is."""
    milliseconds = math.ceil(1000 * seconds)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
