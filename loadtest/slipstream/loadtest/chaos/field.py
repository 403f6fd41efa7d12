"""One stack under a steady load, and what a scenario does to it and waits for."""

import asyncio
import contextlib
import itertools
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import psutil

from slipstream.loadtest.chaos.armed import Armed
from slipstream.loadtest.chaos.asks import MIX, Ask, stopped
from slipstream.loadtest.chaos.client import Client
from slipstream.loadtest.chaos.history import Entry, Facts
from slipstream.loadtest.chaos.stack import ports_in_a_row

PULL_TIMEOUT_S, LEASE_S, RENEW_S, STEP_TIMEOUT_S = 4.0, 3.0, 0.5, 10.0
CLIENTS = 4
PATIENCE_S = 60.0
"""Longest wait for anything that a scenario waits for."""
SETTLE_S = 30.0
"""Longest wait after the last answer, until nothing runs and nothing is held."""
_POLL_S = 0.005
_ROLES = ("scheduler", "kvindex", "tokenizer", "frontend", "prefill", "decode")
_PREFIXES = {"scheduler": "scheduler_", "prefill": "worker_", "decode": "worker_"}


Scenario = Callable[["Field"], Awaitable[None]]


class Unmet(Exception):
    """What a scenario waited for has not come, or what it looked for is not so."""


class Served(Armed):
    """Every process has a /metrics of its own, so that each is asked what it knows itself."""

    def __init__(self, **settings: Any) -> None:
        self.counts = {role: int(settings.get(role, 1)) for role in _ROLES}
        frontends, services = self.counts["frontend"], sum(self.counts.values())
        port = ports_in_a_row(frontends + services)
        self.urls = [f"http://127.0.0.1:{port + index}" for index in range(frontends)]
        names = [f"{role}-{index}" for role in _ROLES for index in range(self.counts[role])]
        self.pages = {name: port + frontends + at for at, name in enumerate(names)}
        variables = {
            "SLIPSTREAM_PULL_TIMEOUT_S": f"{PULL_TIMEOUT_S:g}",
            "SLIPSTREAM_LEASE_S": f"{LEASE_S:g}",
            "SLIPSTREAM_RENEW_S": f"{RENEW_S:g}",
            "SLIPSTREAM_STEP_TIMEOUT_S": f"{STEP_TIMEOUT_S:g}",
        }
        metrics_port = port + frontends
        super().__init__(
            variables, injected=True, port=port, metrics_port=metrics_port, threads=1, **settings
        )

    def page(self, node_id: str) -> dict[str, float]:
        """What one process says of itself now; nothing if it does not answer."""
        try:
            told = self.gauges(self.pages[node_id])
        except OSError:
            return {}
        return {name: value for (_, name), value in told.items()}

    def at_rest(self) -> tuple[int, list[str]]:
        """KV blocks that something holds, and what else is not as it must be at rest."""
        gauges: dict[tuple[str, str], float] = {}
        for node_id in self.pages:
            prefix = _PREFIXES.get(node_id.partition("-")[0], "")
            page = self.page(node_id)
            gauges |= {(node_id, prefix + name): value for name, value in page.items()}
        held = 0.0
        for node in self.workers:
            used, cached, leased, quarantined = (
                gauges.get((node, f"worker_blocks_{name}"), 0.0)
                for name in ("used", "cached", "leased", "quarantined")
            )
            held += max(0.0, used - cached) + leased + quarantined
        return int(held), self.unsettled(gauges)

    def ready(self) -> bool:
        """Every process lives, and every frontend says so."""
        if self.pids().keys() != self.expected or not self.serves():
            return False
        try:
            for url in self.urls:
                urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
        except OSError:
            return False
        return True

    def join(self, role: str, number: int) -> "subprocess.Popen[bytes]":
        """One more worker as those of the role, which nobody starts again."""
        port, name = str(self.pages[f"{role}-0"]), f"{role}-{number}"
        told = " ".join(self.processes()[f"{role}-0"].cmdline()).split()
        other = {f"{role}-0": name, port: "0"}
        words = [other.get(word, word) for word in told[told.index(role) :]]
        environ = self.command[: self.command.index(sys.executable)]
        return subprocess.Popen(
            [*environ, sys.executable, "-P", "-m", "slipstream.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def leaked(self) -> list[str]:
        """Memory of nobody, and processes that ended and are still there."""
        found = []
        if len(self.segments()) > len(self.workers):
            found.append(f"{len(self.segments())} segments of {len(self.workers)} workers")
        for name, process in self.processes().items():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    found.append(f"{name} is a zombie")
        return found


class Field:
    """A stack whose right answers are known. `close` ends it."""

    def __init__(self, stack: Served, asks: list[Ask]) -> None:
        self.stack = stack
        self.asks = {ask.name: ask for ask in asks}
        self.expected: dict[str, Entry] = {}
        self.client = Client(stack.urls)
        self.blow_s: float | None = None
        self.notes: list[str] = []
        """What a scenario found wrong by itself."""
        self._salts = itertools.count()
        self._flights: list[asyncio.Task[None]] = []

    async def learn(self) -> None:
        """Each answer once, with nothing else going on. Unmet: one fails undisturbed."""
        for name, ask in self.asks.items():
            entry = await self._alone(ask)
            if ask.stop_share:
                self.asks[name] = stopped(ask, entry.choices[0].text)
                entry = await self._alone(self.asks[name])
            self.expected[name] = entry
        self.client.entries.clear()

    async def _alone(self, ask: Ask) -> Entry:
        entry, task = self.client.send(ask, cache_salt="undisturbed")
        await task
        if entry.failed or entry.status != 200:
            raise Unmet(f"undisturbed, {ask.name} fails: {entry.code or entry.broken}")
        return entry

    async def close(self) -> None:
        await self.client.close()
        await asyncio.to_thread(self.stack.kill)

    # --- Load -------------------------------------------------------------------------------------

    def send(self, name: str, **more: Any) -> tuple[Entry, "asyncio.Task[None]"]:
        """One request beside the load, of which no cache knows anything."""
        salt = f"own {next(self._salts)}"
        entry, task = self.client.send(self.asks[name], **{"cache_salt": salt, **more})
        self._flights.append(task)
        return entry, task

    @contextlib.asynccontextmanager
    async def load(self) -> AsyncGenerator[None]:
        """Clients that ask one after another meanwhile; then all answers are waited for."""
        over = asyncio.Event()
        clients = [asyncio.create_task(self._ask_on(number, over)) for number in range(CLIENTS)]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*clients, *self._flights, return_exceptions=True)
            self._flights.clear()

    async def _ask_on(self, number: int, over: asyncio.Event) -> None:
        for turn in itertools.count(number * len(MIX) // CLIENTS):
            name = MIX[turn % len(MIX)]
            # Every other time round nothing is found in a cache.
            salt = "warm" if turn // len(MIX) % 2 else f"cold {next(self._salts)}"
            await self.client.send(self.asks[name], cache_salt=salt)[1]
            if over.is_set():
                return

    # --- Waiting ----------------------------------------------------------------------------------

    async def until(
        self, condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S
    ) -> Any:
        """For what is known on this loop. Unmet."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > deadline_s:
                raise Unmet(f"in vain: {what}")
            await asyncio.sleep(_POLL_S)
        return found

    async def until_asked(
        self, condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S
    ) -> Any:
        """For what a process has to be asked. Unmet."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := await asyncio.to_thread(condition)):
            if time.monotonic() > deadline_s:
                raise Unmet(f"in vain: {what}")
            await asyncio.sleep(_POLL_S)
        return found

    async def streaming(self, count: int = 2) -> None:
        """So many streams of the load are under way."""

        def under_way() -> bool:
            return sum(bool(e.times_s) and not e.end_s for e in self.client.entries) >= count

        await self.until(under_way, f"{count} streams")

    async def reached(self, entry: Entry, pieces: int) -> None:
        """So much of an answer has come, or its end."""
        await self.until(lambda: len(entry.times_s) >= pieces or entry.end_s, f"{pieces} pieces")

    async def committed(self, role: str, fault: str, count: int = 1) -> list[str]:
        """What an armed fault says of its first time: who did it, to whom."""
        found = await self.until(
            # Whoever did it may still be writing.
            lambda: len(told := self.stack.committed(role, fault)) >= count and all(told) and told,
            f"{fault} at {role}",
        )
        return str(found[0]).split()

    async def back(self, node_id: str, epoch: int) -> None:
        """A process has a successor that the cluster knows."""

        def known() -> bool:
            return self.stack.epochs().get(node_id, 0) > epoch

        await self.until_asked(known, f"{node_id} is back")

    async def epoch(self, node_id: str) -> int:
        epochs = await asyncio.to_thread(self.stack.epochs)
        return epochs.get(node_id, 0)

    # --- Blows ------------------------------------------------------------------------------------

    def strike(self, node_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """The pause of the streams is counted from the first one on."""
        self.mark()
        self.stack.send(node_id, number)

    def mark(self) -> None:
        self.blow_s = self.blow_s or time.monotonic()

    async def stand_still(self, node_id: str, for_s: float) -> None:
        """SIGSTOP, and SIGCONT whatever happens."""
        self.strike(node_id, signal.SIGSTOP)
        try:
            await asyncio.sleep(for_s)
        finally:
            self.stack.send(node_id, signal.SIGCONT)

    def hold(self, condition: bool, told: str) -> None:
        """Something that only this scenario can see must be so."""
        if not condition:
            self.notes.append(told)

    # --- Afterwards -------------------------------------------------------------------------------

    async def rest(self) -> Facts:
        """Once everything is there again and has had its time to let go. Unmet: it is not."""
        await self.until_asked(self.stack.ready, "every process is there and ready")
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            held, unsettled = await asyncio.to_thread(self.stack.at_rest)
            if not (held or unsettled) or time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.1)
        leaked = await asyncio.to_thread(self.stack.leaked)
        return Facts(stranded=held, unsettled=unsettled, leaked=leaked)

    def take(self) -> tuple[list[Entry], float | None, list[str]]:
        """What has been noted since the last time: entries, moment of the blow, notes."""
        taken = self.client.entries, self.blow_s, self.notes
        self.client.entries, self.blow_s, self.notes = [], None, []
        return taken


def settings_of(name: str) -> Mapping[str, Any]:
    """Of the stacks that rows ask for: every role twice; or one small pool and no Redis."""
    return {
        "twins": {
            **{"prefill": 2, "decode": 2, "tokenizer": 2, "frontend": 2},
            **{"prefill_budget_tokens": 512, "kv_cache_bytes": "144MiB"},
        },
        "small": {
            **{"max_model_len": 512, "kv_cache_bytes": "30MiB"},
            "redis_url": "redis://127.0.0.1:1",
        },
    }[name]
