"""Who asks: the key that a request shows, what it may, and what it has used."""

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, Metric

from slipstream.config import SetupError
from slipstream.errors import ErrorCode
from slipstream.frontend.api_keys import PRIORITY_MIN, ApiKey, Keyring, read
from slipstream.frontend.problems import ApiError, api_error
from slipstream.frontend.quota import Allowance, Quota
from slipstream.runtime.metric_table import HTTP

OPEN = frozenset({"/livez", "/readyz", "/health"})
PAGE_FILES = "/playground/"
OPERATORS = frozenset({"/metrics", "/cluster"})
"""Would tell one client of the others."""
RELOAD_S = 1.0
"""How often the file is looked at."""

_log = logging.getLogger("slipstream.frontend")


class Caller:
    """Somebody without a name, who may do everything: where no keys are asked for."""

    tenant = ""
    weight = 1
    priority_min = PRIORITY_MIN
    operator = True

    def spend(self, tokens: int) -> None: ...

    def salt(self, salt: str) -> str:
        """The cache namespace: no two clients share one, whatever salt they say."""
        return salt

    def headers(self) -> dict[str, str]:
        return {}


class Client(Caller):
    """One name of the file, under however many keys."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.tenant = key.name
        self._clock, self._parts = clock, 1
        self._quota = Quota(Allowance(), clock())
        self.counts: Counter[str] = Counter(requests=0, tokens=0, refused=0)
        self.renew(key)

    def renew(self, key: ApiKey) -> None:
        """What the file says now."""
        self.key, self.weight = key, key.weight
        self.priority_min, self.operator = key.priority_min, key.operator
        self._limits = Allowance(key.requests_per_minute, key.tokens_per_minute, key.max_concurrent)
        self._quota.resize(self._limits.divided(self._parts), self._clock())

    @contextlib.contextmanager
    def working(self, frontends: int) -> Iterator[None]:
        """While one of its requests is answered, at one of so many frontends. ApiError: it is one
        too many."""
        now_s, parts = self._clock(), max(1, frontends)
        if parts != self._parts:
            self._parts = parts
            self._quota.resize(self._limits.divided(parts), now_s)
        if (problem := self._quota.refusal(self.tenant, now_s)) is not None:
            self.counts["refused"] += 1
            raise ApiError(problem)
        self.counts["requests"] += 1
        self._quota.begin(now_s)
        try:
            yield
        finally:
            self._quota.end()

    def spend(self, tokens: int) -> None:
        self.counts["tokens"] += tokens
        self._quota.spend(tokens, self._clock())

    def salt(self, salt: str) -> str:
        # No salt of a client's has a slash: what stands before it is never theirs to choose.
        group = self.key.share_prefixes
        return f"group/{group}/{salt}" if group else f"key/{self.tenant}/{salt}"

    def headers(self) -> dict[str, str]:
        return self._quota.headers(self._clock())


NOBODY = Caller()
CALLER = web.RequestKey("caller", Caller)


class Callers:
    """All clients that there are, as the file says; without one everybody is nobody."""

    def __init__(self, path: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """SetupError: the file cannot be used."""
        self._path, self._clock = path, clock
        self._clients: dict[str, Client] = {}
        self._keyring: Keyring | None = None
        self._seen: tuple[int, ...] = ()
        if path:
            self._seen = self._stamp()
            self._take(read(path))

    def identify(self, request: web.Request) -> Client | None:
        """None: nobody needs to be known. ApiError: no key, a wrong one, or one that may not ask
        for this."""
        if self._keyring is None or _is_open(request):
            return None
        offered = _offered(request)
        key = self._keyring.find(offered) if offered else None
        if key is None:
            raise _unauthorized(request, given=bool(offered))
        client = self._clients[key.name]
        if request.path in OPERATORS and not client.operator:
            text = f"{request.path} tells of all clients; it takes a key with 'operator = true'."
            raise api_error(ErrorCode.FORBIDDEN, text)
        return client

    async def watch(self) -> None:
        """Until cancelled: takes what the file says whenever it has changed."""
        while self._path:
            await asyncio.sleep(RELOAD_S)
            if (stamp := self._stamp()) != self._seen:
                self._seen = stamp
                self.reload()

    def reload(self) -> None:
        """What cannot be read changes nothing."""
        try:
            self._take(read(self._path))
        except SetupError as error:
            _log.error("the keys of before hold on: %s", error)
        else:
            _log.info("%s: %d clients", self._path, len(self._clients))

    def families(self) -> Iterator[Metric]:
        names = {
            "requests": "slipstream_key_requests_total",
            "tokens": "slipstream_key_tokens_total",
            "refused": "slipstream_key_refused_total",
        }
        for what, name in names.items() if self._clients else ():
            family = CounterMetricFamily(name, HTTP[name], labels=["key"])
            for tenant, client in sorted(self._clients.items()):
                family.add_metric([tenant], client.counts[what])
            yield family

    def _take(self, keys: list[ApiKey]) -> None:
        clients: dict[str, Client] = {}
        for key in keys:
            client = clients.setdefault(
                key.name, self._clients.get(key.name) or Client(key, self._clock)
            )
            client.renew(key)
        self._clients, self._keyring = clients, Keyring(keys)

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_ino, found.st_size


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
