"""Keeps child processes alive, shows what they print, and stops them in order.

Uses asyncio's own loop: nothing here is fast, and children are waited for without polling.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slipstream.cli.plan import ChildSpec
from slipstream.cli.pulse import Listener
from slipstream.config import env_of
from slipstream.errors import ExitCode

_FINAL = frozenset(code for code in ExitCode if code.is_final)
QUICK_DEATHS_MAX = 5
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
STEADY_AFTER_S = 10.0
STOP_S = 5.0
_LINE_BYTES = 2**20
_PR_SET_PDEATHSIG = 1

Show = Callable[[str, str], None]
"""Called with (node id, line)."""


class Failure(Exception):
    """A child cannot start: its own one line, and its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Child:
    """One process that is started again whenever it ends."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.quick_deaths = 0
        self.restarts = 0
        self.last_line = ""

    @property
    def pid(self) -> int:
        return self.process.pid if self.process and self.process.returncode is None else 0

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    def __init__(
        self, specs: Sequence[ChildSpec], show: Show, run_dir: Path, watchdog_s: float = 0.0
    ) -> None:
        """`run_dir`: where children say that they live; `watchdog_s`: how long one that has spoken
        may be silent, 0: for ever."""
        self.children = [Child(spec) for spec in specs]
        self.failed: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        self.ready = False
        """Set once the cluster has been ready: from then on nothing is given up."""
        self._show = show
        self._run_dir, self._watchdog_s = run_dir, watchdog_s
        self._stopping = asyncio.Event()
        self._kill_now = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._die_with_parent = die_with_parent()

    def start(self) -> None:
        for child in self.children:
            self._tasks[child.spec.node_id] = asyncio.create_task(self._keep(child))

    def pids(self) -> dict[str, int]:
        return {child.spec.node_id: child.pid for child in self.children}

    def kill_now(self) -> None:
        """Ends a `stop` that waits for running requests."""
        self._kill_now.set()

    async def stop(self, order: Sequence[Sequence[str]], drain_s: float) -> None:
        """SIGTERM to one group of roles after the other; SIGKILL to what does not end in time.

        The first group gets `drain_s` more to finish its requests than the others, `STOP_S` each.
        """
        self._stopping.set()
        limit_s = drain_s + STOP_S
        for roles in order:
            members = [child for child in self.children if child.spec.role in roles]
            for child in members:
                child.signal(signal.SIGTERM)
            await self._ended(members, limit_s)
            limit_s = STOP_S
        await asyncio.gather(*self._tasks.values())

    async def _ended(self, members: list[Child], limit_s: float) -> None:
        tasks = [self._tasks[child.spec.node_id] for child in members]
        hurry = asyncio.create_task(self._kill_now.wait())
        everything = asyncio.gather(*tasks)
        first: set[asyncio.Future[Any]] = {everything, hurry}
        await asyncio.wait(first, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        for child in members:
            if child.pid:
                self._show(child.spec.node_id, "does not end; killed")
                child.signal(signal.SIGKILL)
        await everything

    async def _keep(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        delay = FIRST_DELAY_S
        while not self._stopping.is_set():
            started = loop.time()
            code = await self._run_once(child)
            if self._stopping.is_set():
                return
            if loop.time() - started >= STEADY_AFTER_S:
                delay, child.quick_deaths = FIRST_DELAY_S, 0
            child.quick_deaths += 1
            if self._give_up(child, code):
                return
            last = f" ({child.last_line})" if child.spec.quiet and child.last_line else ""
            self._show(child.spec.node_id, f"{_ending(code)}{last}; starts again in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(2 * delay, LONGEST_DELAY_S)
            child.restarts += 1

    def _give_up(self, child: Child, code: int) -> bool:
        if self.ready:
            return False
        node_id = child.spec.node_id
        if code in _FINAL:
            failure = Failure(child.last_line or f"{node_id}: exit code {code}", code)
        elif child.quick_deaths >= QUICK_DEATHS_MAX:
            times = f"{QUICK_DEATHS_MAX} times in a row"
            last = f": {child.last_line}" if child.last_line else ""
            failure = Failure(
                f"slipstream serve: {node_id} {_ending(code)} {times}{last}", ExitCode.FAILED
            )
        else:
            return False
        if not self.failed.done():
            self.failed.set_result(failure)
        return True

    async def _run_once(self, child: Child) -> int:
        """One life of a child; its exit code, negative for a signal."""
        async with Listener(self._run_dir / f"{child.spec.node_id}.notify") as listener:
            return await self._watched(child, listener)

    async def _watched(self, child: Child, listener: Listener) -> int:
        spec = child.spec
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                env={**spec.env, env_of("notify_socket"): str(listener.path)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us to pass on, in order
                preexec_fn=self._die_with_parent,
                limit=_LINE_BYTES,
            )
        except OSError as error:
            child.last_line = f"{spec.argv[0]}: {error.strerror}"
            return 127
        child.process = process
        if self._stopping.is_set():
            child.signal(signal.SIGTERM)
        pump = asyncio.create_task(self._pump(child, process))
        watch = asyncio.create_task(self._watch(child, listener))
        code = await process.wait()
        watch.cancel()
        await asyncio.wait({pump}, timeout=1.0)  # a grandchild may hold the pipe open
        pump.cancel()
        return code

    async def _watch(self, child: Child, listener: Listener) -> None:
        if self._watchdog_s:
            await listener.silence(self._watchdog_s)
            text = f"has given no sign of life for {self._watchdog_s:g} s; killed"
            self._show(child.spec.node_id, text)
            child.signal(signal.SIGKILL)

    async def _pump(self, child: Child, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line longer than the limit: shown in part would mislead
                self._show(child.spec.node_id, "(a line too long to show)")
                continue
            if not raw:
                return
            line = raw.decode("utf-8", "replace").rstrip()
            if line:
                child.last_line = line
                if not child.spec.quiet:
                    self._show(child.spec.node_id, line)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def die_with_parent() -> Callable[[], None] | None:
    """For a new child: the kernel kills it when this process ends, even by SIGKILL."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # before the fork, after which little is safe
    parent = os.getpid()

    def set_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL.value)
        if os.getppid() != parent:
            os._exit(1)

    return set_signal
