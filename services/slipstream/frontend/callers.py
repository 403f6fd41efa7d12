"""Who asks: the key that a request shows, what it may, and what it has used."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, Metric

from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.api_keys import PRIORITY_MIN, ApiKey, Keyring, read
from slipstream.frontend.problems import ApiError, api_error
from slipstream.frontend.quota import Allowance, MonthQuota, Quota, duration
from slipstream.frontend.trail import Trail
from slipstream.frontend.usage import Kind, Ledger, Period, Used
from slipstream.frontend.watched import Watched
from slipstream.runtime.metric_table import HTTP

OPEN = frozenset({"/livez", "/readyz", "/health"})
PAGE_FILES = "/playground/"
OPERATORS = frozenset({"/metrics", "/cluster"})
"""Would tell one client of the others."""
_FAMILIES = {
    "slipstream_key_requests_total": (Kind.REQUESTS,),
    "slipstream_key_tokens_total": (Kind.PROMPT_TOKENS, Kind.COMPLETION_TOKENS),
    "slipstream_key_prompt_tokens_total": (Kind.PROMPT_TOKENS,),
    "slipstream_key_cached_tokens_total": (Kind.CACHED_TOKENS,),
    "slipstream_key_completion_tokens_total": (Kind.COMPLETION_TOKENS,),
    "slipstream_key_refused_total": (Kind.REFUSED,),
}


class Caller:
    """Somebody without a name, who may do everything: where no keys are asked for."""

    tenant = ""
    weight = 1
    priority_min = PRIORITY_MIN
    operator = True

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._ledger, self.clock = ledger, clock
        self.meter = ledger.meter(self.tenant)
        self._unnamed = 0
        """Let in, and not counted yet: the model that they ask for is not known."""

    @contextlib.contextmanager
    def working(self, frontends: int) -> Iterator[Trail]:
        """While one of its requests is answered, at one of so many frontends. ApiError: it is one
        too many."""
        now_s = self.clock()
        if (problem := self.refusal(frontends, now_s)) is not None:
            self.meter.count("", Kind.REFUSED, 1, now_s)
            raise ApiError(problem)
        trail = Trail(self, now_s)
        self._unnamed += 1
        self._begin(now_s)
        try:
            yield trail
        finally:
            if not trail.answer_id:
                self.named("")
            elif trail.goes_on:
                self._unnamed -= 1
            self._end()

    def refusal(self, frontends: int, now_s: float) -> Problem | None:
        return None

    def named(self, model: str) -> None:
        """The model that a request asks for; empty: none."""
        self._unnamed -= 1
        self.meter.count(model, Kind.REQUESTS, 1, self.clock())

    def spend(self, model: str, kind: Kind, tokens: int) -> None:
        self.meter.count(model, kind, tokens, self.clock())

    def salt(self, salt: str) -> str:
        """The cache namespace: no two clients share one, whatever salt they say."""
        return salt

    def headers(self) -> dict[str, str]:
        return {}

    def limits(self, now_s: float) -> Iterator[tuple[str, int, int, float]]:
        """(name, limit, what is left of it, seconds until all of it is there) of each."""
        yield from ()

    def _begin(self, now_s: float) -> None: ...

    def _end(self) -> None: ...


class Client(Caller):
    """One name of the file, under however many keys."""

    def __init__(self, key: ApiKey, ledger: Ledger, clock: Callable[[], float]) -> None:
        self.tenant, self._parts = key.name, 1
        self._quota = Quota(Allowance(), clock())
        super().__init__(ledger, clock)
        self.renew(key)

    def renew(self, key: ApiKey) -> None:
        """What the file says now."""
        self.key, self.weight = key, key.weight
        self.priority_min, self.operator = key.priority_min, key.operator
        self._limits = Allowance(key.requests_per_minute, key.tokens_per_minute, key.max_concurrent)
        self._month = MonthQuota(key.requests_per_month, key.tokens_per_month)
        self._quota.resize(self._limits, self.clock(), self._parts)

    def share(self, used: Used, now_s: float) -> None:
        """What it has used at other frontends since the last time."""
        self._quota.share(used.requests, used.tokens, now_s)

    def refusal(self, frontends: int, now_s: float) -> Problem | None:
        if (parts := max(1, frontends)) != self._parts:
            self._parts = parts
            self._quota.resize(self._limits, now_s, parts)
        problem = self._quota.refusal(self.tenant, now_s)
        if problem is None and any(self._month):
            problem = self._month.refusal(self.tenant, *self._used(now_s))
        return problem

    def spend(self, model: str, kind: Kind, tokens: int) -> None:
        super().spend(model, kind, tokens)
        if kind is not Kind.CACHED_TOKENS:
            self._quota.spend(tokens, self.clock())

    def salt(self, salt: str) -> str:
        # No salt of a client's has a slash: what stands before it is never theirs to choose.
        group = self.key.share_prefixes
        return f"group/{group}/{salt}" if group else f"key/{self.tenant}/{salt}"

    def headers(self) -> dict[str, str]:
        return {
            f"x-ratelimit-{word}-{name}": text
            for name, limit, left, full_s in self.limits(self.clock())
            for word, text in (
                ("limit", str(limit)), ("remaining", str(left)), ("reset", duration(full_s))
            )
        }  # fmt: skip

    def limits(self, now_s: float) -> Iterator[tuple[str, int, int, float]]:
        yield from self._quota.limits(now_s)
        if any(self._month):
            yield from self._month.limits(*self._used(now_s))

    def _used(self, now_s: float) -> tuple[Used, Period, float]:
        """Of this month, by what is known; the month, and the time in it."""
        account, shared = self.meter.month(now_s), self._ledger.shared(now_s)
        used = account.used(1 if shared else self._parts)
        used = Used(used.requests + self._unnamed, used.tokens)
        return used, account.period, self._ledger.unix_s(now_s)

    def _begin(self, now_s: float) -> None:
        self._quota.begin(now_s)

    def _end(self) -> None:
        self._quota.end()


CALLER = web.RequestKey("caller", Caller)
TRAIL = web.RequestKey("trail", Trail)


class Callers:
    """All clients that there are, as the file says; without one everybody is nobody."""

    def __init__(
        self,
        path: str = "",
        clock: Callable[[], float] = time.monotonic,
        note: Callable[[str, str], None] | None = None,
    ) -> None:
        """`note`: is told of every change of the file. SetupError: it cannot be used."""
        self.clock, self._note = clock, note or (lambda act, text: None)
        self.ledger = Ledger(time.time(), clock())
        self.nobody = Caller(self.ledger, clock)
        self._clients: dict[str, Client] = {}
        self._keyring: Keyring | None = None
        unusable = partial(self._note, "keys_unusable")
        self._file = Watched[list[ApiKey]](path, read, [], self._renew, unusable)
        if path:
            self._take(self._file.now)

    def identify(self, request: web.Request) -> Caller:
        """Nobody, where nobody needs to be known. ApiError: no key, a wrong one, or one that may
        not ask for this."""
        if self._keyring is None or _is_open(request):
            return self.nobody
        offered = _offered(request)
        key = self._keyring.find(offered) if offered else None
        if key is None:
            raise _unauthorized(request, given=bool(offered))
        request[CALLER] = client = self._clients[key.name]
        if request.path in OPERATORS and not client.operator:
            text = f"{request.path} tells of all clients; it takes a key with 'operator = true'."
            raise api_error(ErrorCode.FORBIDDEN, text)
        return client

    async def watch(self) -> None:
        """Until cancelled: takes what the file says whenever it has changed."""
        await self._file.watch()

    def share(self, used: Mapping[str, Used], now_s: float) -> None:
        """What each has used at other frontends, by name."""
        for tenant, amount in used.items():
            if (client := self._clients.get(tenant)) is not None:
                client.share(amount, now_s)

    def all(self) -> list[Caller]:
        """Without a file that is nobody."""
        clients = sorted(self._clients.values(), key=lambda client: client.tenant)
        return [*clients] if self._keyring else [self.nobody]

    def families(self) -> Iterator[Metric]:
        for name, kinds in _FAMILIES.items() if self._clients else ():
            family = CounterMetricFamily(name, HTTP[name], labels=["key", "model"])
            for client in self.all():
                for model, row in sorted(client.meter.totals.items()) or [("", [0] * len(Kind))]:
                    family.add_metric([client.tenant, model], sum(row[kind] for kind in kinds))
            yield family

    def _take(self, keys: list[ApiKey]) -> None:
        clients: dict[str, Client] = {}
        for key in keys:
            client = clients.setdefault(
                key.name, self._clients.get(key.name) or Client(key, self.ledger, self.clock)
            )
            client.renew(key)
        self._clients, self._keyring = clients, Keyring(keys)
        self.ledger.keep({"", *clients})

    def _renew(self, keys: list[ApiKey]) -> None:
        self._take(keys)
        self._note("keys_read", ", ".join(self._clients))


def _is_open(request: web.Request) -> bool:
    """Probes, and the page, which is the same for everybody; what it asks for is not."""
    path = request.path
    if request.method not in ("GET", "HEAD"):
        return False
    wants_page = path == "/" and "text/html" in request.headers.get("Accept", "")
    return path in OPEN or path.startswith(PAGE_FILES) or wants_page


def _offered(request: web.Request) -> bytes:
    """The one key that is shown, in whichever header; empty if there is none, or more than one."""
    bearers = request.headers.getall("Authorization", [])
    plain = request.headers.getall("x-api-key", [])
    if len(bearers) > 1 or len(plain) > 1:
        return b""
    shown = {value.strip() for value in plain}
    for value in bearers:
        scheme, _, key = value.partition(" ")
        shown.add(key.strip() if scheme.lower() == "bearer" else "")
    return shown.pop().encode("utf-8", "surrogateescape") if len(shown) == 1 else b""


def _unauthorized(request: web.Request, given: bool) -> ApiError:
    if given:
        text = "The API key is not one of this server's."
    else:
        text = "This server asks for an API key: send one 'Authorization: Bearer KEY'"
        text += ", not in the URL." if request.query_string else ", or 'x-api-key: KEY'."
    error = api_error(ErrorCode.UNAUTHORIZED, text)
    return ApiError(error.problem, {"WWW-Authenticate": "Bearer"})
