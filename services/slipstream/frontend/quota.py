"""How much one client may ask for: requests and tokens in a minute, requests at a time."""

import math
from typing import NamedTuple

from slipstream.errors import ErrorCode, Problem

MINUTE_S = 60.0


class Allowance(NamedTuple):
    """0: none."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0

    def divided(self, parts: int) -> "Allowance":
        """Among so many, who do not speak of it: of each limit at least one is left."""
        return Allowance(*(-(-limit // parts) for limit in self))


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

    def wait_s(self, amount: float, now_s: float) -> float:
        """Until so much is there."""
        return max(0.0, amount - self.level(now_s)) * MINUTE_S / self.limit


class Quota:
    """One client's account. `begin` before each request, `end` after it, `spend` as tokens come."""

    def __init__(self, limits: Allowance, now_s: float) -> None:
        self._requests = Bucket(limits.requests_per_minute, now_s)
        self._tokens = Bucket(limits.tokens_per_minute, now_s)
        self._max_concurrent = limits.max_concurrent
        self.running = 0

    def resize(self, limits: Allowance, now_s: float) -> None:
        self._requests.resize(limits.requests_per_minute, now_s)
        self._tokens.resize(limits.tokens_per_minute, now_s)
        self._max_concurrent = limits.max_concurrent

    def refusal(self, name: str, now_s: float) -> Problem | None:
        """Why `name` may not begin another one now."""
        requests, tokens = self._requests, self._tokens
        if requests.limit and (wait_s := requests.wait_s(1, now_s)):
            return _refused(name, f"{requests.limit} requests per minute are used up", wait_s)
        if tokens.limit and (wait_s := tokens.wait_s(1, now_s)):
            return _refused(name, f"{tokens.limit} tokens per minute are used up", wait_s)
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

    def headers(self, now_s: float) -> dict[str, str]:
        """As OpenAI has them; nothing of what has no limit."""
        found = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket.limit:
                left = max(0, math.floor(bucket.level(now_s)))
                found[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                found[f"x-ratelimit-remaining-{name}"] = str(left)
                full_s = bucket.wait_s(bucket.limit, now_s)
                found[f"x-ratelimit-reset-{name}"] = duration(full_s)
        return found


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
