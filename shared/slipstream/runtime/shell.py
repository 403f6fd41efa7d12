"""The shell around every machine: sockets, clock, timers, signals, health, exit code.

One thread, one loop, one turn after another. A turn takes what the executor has posted, a bounded
number of frames, the timers that are due and the sessions' own chores; what it leaves is for the
next turn, so that nothing starves. Time is the host's monotonic clock.
"""

import asyncio
import gc
import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import uvloop

from slipstream import curve
from slipstream.config import ServiceConfig
from slipstream.core.link import Transmit
from slipstream.core.machine import (
    CancelTimer,
    Drain,
    Effect,
    Event,
    Exit,
    Machine,
    Note,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.core.node import Action, Node
from slipstream.core.span_recorder import SpanRecorder
from slipstream.errors import ExitCode
from slipstream.messages import SCHEDULER, NodeInfo
from slipstream.runtime.bus import Bus
from slipstream.runtime.log import set_up
from slipstream.runtime.metrics import metrics
from slipstream.runtime.pulse import Pulse
from slipstream.runtime.record import Recorder
from slipstream.runtime.timers import Timers
from slipstream.runtime.witness import Witness
from slipstream.types import Role

FRAMES_PER_TURN = 256
EVENTS_PER_TURN = 256
CHORES_PERIOD_S = 0.5
LAG_PERIODS = 20
LINGER_S = 0.5
"""For the last words of a process that ends in order."""
DRAIN_S = 15.0
"""After that others take up what is left: sooner than who waits for this process gives up."""
CLOSE_S = 3.0
"""For the end of the executor."""
FORCED_CLOSE_S = 1.0
"""The same after a bug or a second signal; a thread that hangs does not keep the process then."""

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Carries out the effects that are neither messages nor timers nor Exit.

    Its methods run on the event loop.
    """

    async def start(self, post: Callable[[Event], None]) -> None:
        """Before the machine's first event. `post` hands an event to the machine and may be called
        from any thread. StartError if the process cannot do its work."""
        ...

    def execute(self, effect: Effect) -> None:
        """Must not block; what takes time ends as a posted event."""
        ...

    async def close(self) -> None:
        """Called once, also if `start` failed or was cancelled."""
        ...


@runtime_checkable
class Measured(Protocol):
    """An executor that has something to say in /metrics; keys as a machine's."""

    def statistics(self) -> dict[str, float]: ...


def run_service(
    config: ServiceConfig,
    info: NodeInfo,
    machine: Machine,
    executor: Executor | None = None,
    *,
    drain_timeout_s: float = DRAIN_S,
    spans: SpanRecorder | None = None,
) -> int:
    """Binds `config.listen` and runs until the machine says Exit; returns the exit code. `spans`
    is told of every event.

    SIGTERM or SIGINT is the event `Drain`; a second one, or `drain_timeout_s` without an end, ends
    the process at once. StartError if an address is taken or the executor cannot start.
    """
    set_up(config.log_level, info.node_id, config.log_json)
    shell = _Shell(config, info, machine, executor, drain_timeout_s, spans)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(shell.run())
    logging.shutdown()
    return code


class _Shell:
    def __init__(
        self,
        config: ServiceConfig,
        info: NodeInfo,
        machine: Machine,
        executor: Executor | None,
        drain_timeout_s: float,
        spans: SpanRecorder | None,
    ) -> None:
        self._config, self._info, self._machine = config, info, machine
        self._executor, self._drain_timeout_s = executor, drain_timeout_s
        keys = curve.load(config.keys_dir, info.role)
        self._bus = Bus(f"slipstream {info.role}", config.listen, keys)
        self._recorder = (
            Recorder(Path(config.record), f"{info.node_id}-{info.epoch}") if config.record else None
        )
        self._witness = Witness(machine, self._bus.forget, self._recorder, spans)
        scheduler = None if info.role is Role.SCHEDULER else (SCHEDULER, config.scheduler)
        self._node = Node(info, self._witness, scheduler, config.peer_timeout_s)
        self._timers = Timers()
        self._posted: deque[Event] = deque()
        self._turn_due = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = math.inf
        self._running = self._draining = False
        self._pulse: Pulse | None = None
        self._chores_s = 0.0
        self._lags_s: deque[float] = deque([0.0], maxlen=LAG_PERIODS)
        self._close_health: Callable[[], Awaitable[None]] | None = None

    # --- From start to end ------------------------------------------------------------------------

    async def run(self) -> int:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        code = 0
        try:
            await self._start()
            code = await self._ended
        finally:
            await self._close(code)
        return code

    async def _start(self) -> None:
        if self._config.metrics_port:
            await self._serve_health()
        if self._executor is not None:
            starting = asyncio.ensure_future(self._executor.start(self._post))
            first: set[asyncio.Future[Any]] = {starting, self._ended}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():  # a signal came first
                starting.cancel()
                with suppress(asyncio.CancelledError):
                    await starting
                return
            starting.result()
        if self._ended.done():
            return
        log.info("listens at %s", self._config.listen)
        gc.freeze()  # what is there by now stays: collections need not walk through it
        self._running = True
        self._posted.appendleft(Started())
        self._loop.add_reader(self._bus.descriptor, self._turn)
        self._chores_s = time.monotonic()
        self._pulse = Pulse(self._config.watchdog_s, self._config.notify_socket)
        self._chores()
        self._turn()

    async def _serve_health(self) -> None:
        from slipstream.runtime import health  # aiohttp is slow to import, and seldom wanted

        config, info = self._config, self._info
        self._close_health = await health.serve(
            f"slipstream {info.role}",
            config.metrics_host,
            config.metrics_port,
            self._missing,
            lambda: metrics(self._statistics(), info.node_id, info.role),
        )

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._running:  # there is nothing to finish yet, or any more
            self._end(0)
        elif self._draining:
            log.warning("ends at once: a second signal")
            self._end(128 + number)
        else:
            self._draining = True
            log.info("drains: %s", number.name)
            self._post(Drain())
            self._loop.call_later(self._drain_timeout_s, self._on_drain_timeout)

    def _on_drain_timeout(self) -> None:
        if self._running:
            log.warning("ends at once: not drained after %g s", self._drain_timeout_s)
            # What others do not take up is a client's connection, and nothing else.
            self._end(ExitCode.FAILED if self._info.role is Role.FRONTEND else ExitCode.OK)

    def _end(self, code: int) -> None:
        self._running = False
        if not self._ended.done():
            self._ended.set_result(code)

    async def _close(self, code: int) -> None:
        self._running = False
        if self._pulse is not None:
            self._pulse.close()
        self._loop.remove_reader(self._bus.descriptor)
        if code:
            _end_anyway(code)
        if code != ExitCode.BUG:  # then not even the sessions may be whole
            for last in self._node.leave(time.monotonic()):
                self._bus.transmit(last, time.monotonic())
        if self._executor is not None:
            try:
                async with asyncio.timeout(FORCED_CLOSE_S if code else CLOSE_S):
                    await self._executor.close()
            except Exception:  # whatever it was, sockets and files must be closed too
                log.exception("the executor does not close")
        if self._close_health is not None:
            await self._close_health()
        self._bus.close(linger_s=0.0 if code else LINGER_S)
        if self._recorder is not None:
            self._recorder.close()

    # --- Turns ------------------------------------------------------------------------------------

    def _post(self, event: Event) -> None:
        self._posted.append(event)
        self._turn_soon()

    def _turn_soon(self) -> None:
        """From any thread. A turn clears the mark before it looks, so that no event is missed."""
        if not self._turn_due:
            self._turn_due = True
            with suppress(RuntimeError):  # the loop is closed: nobody will look
                if threading.get_ident() == self._thread:  # it need not be woken
                    self._loop.call_soon(self._turn)
                else:
                    self._loop.call_soon_threadsafe(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if not self._running:
            return
        try:
            more = self._take_events() | self._take_frames() | self._take_timers()
        except Exception:  # a bug: the machine may be half changed and must not go on
            log.exception("ends with exit code %d", ExitCode.BUG)
            self._end(ExitCode.BUG)
            return
        if more:
            self._turn_soon()
        self._set_alarm()

    def _take_events(self) -> bool:
        """Whether there may be more; so for frames and timers."""
        for _ in range(EVENTS_PER_TURN):
            if not self._posted or not self._running:
                return False
            now_s = time.monotonic()
            self._perform(self._node.handle(self._posted.popleft(), now_s), now_s)
        return True

    def _take_frames(self) -> bool:
        for _ in range(FRAMES_PER_TURN):
            frame = self._bus.receive() if self._running else None
            if frame is None:
                return False
            now_s = time.monotonic()
            self._perform(self._node.receive(*frame, now_s), now_s)
        return True

    def _take_timers(self) -> bool:
        """After the frames: what has come in while the process stood still is a sign of life."""
        now_s = time.monotonic()
        for key in islice(self._timers.due(now_s), EVENTS_PER_TURN):
            self._perform(self._node.handle(TimerFired(key), now_s), now_s)
            if not self._running:
                return False
        if self._running and self._node.next_wake_s() <= now_s:
            self._perform(self._node.wake(now_s), now_s)
        return False  # what is left is due: the alarm rings at once

    def _perform(self, actions: Iterable[Action], now_s: float) -> None:
        for action in actions:
            match action:
                case Transmit():
                    self._bus.transmit(action, now_s)
                case SetTimer(key, at_s):
                    self._timers.set(key, at_s)
                case CancelTimer(key):
                    self._timers.cancel(key)
                case Note(text):
                    log.info("%s", text)
                case Exit(fault):
                    if fault:
                        log.error("ends: %s", fault)
                    else:
                        log.info("drained" if self._draining else "ends: the machine is done")
                    self._end(ExitCode.FAULT if fault else ExitCode.OK)
                case _:
                    assert self._executor is not None, f"no executor for {type(action).__name__}"
                    self._executor.execute(action)

    def _set_alarm(self) -> None:
        at_s = min(self._timers.next_s(), self._node.next_wake_s())
        if at_s >= self._alarm_s:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = at_s
        # The loop counts in ms: rounded up, or it would ring early and spin until it is time.
        delay_ms = math.ceil(max(0.0, at_s - time.monotonic()) * 1000)
        self._alarm = self._loop.call_later(delay_ms / 1000, self._ring)

    def _ring(self) -> None:
        self._alarm, self._alarm_s = None, math.inf
        self._turn()

    def _chores(self) -> None:
        now_s = time.monotonic()
        self._lags_s.append(max(0.0, now_s - self._chores_s))
        self._bus.sweep(now_s)
        if self._pulse is not None:
            self._pulse.beat()
        self._chores_s = now_s + CHORES_PERIOD_S
        if self._running:
            self._loop.call_later(CHORES_PERIOD_S, self._chores)

    # --- Pages ------------------------------------------------------------------------------------

    def _missing(self) -> str:
        """Why this process is not ready; empty if it is."""
        if self._draining:
            return "draining"
        if not self._running:
            return "starting"
        membership = getattr(self._machine, "membership", None)
        if membership is not None and not membership.scheduler_up:
            return "no session with the scheduler"
        if not getattr(self._machine, "ready", True):
            return str(getattr(self._machine, "reason", "")) or "the machine is not ready"
        return ""

    def _statistics(self) -> dict[str, float]:
        executor = self._executor
        return {
            **self._machine.statistics(),
            **(executor.statistics() if isinstance(executor, Measured) else {}),
            **self._bus.statistics(),
            "peers_up": len(self._witness.up),
            "events_total": self._witness.events,
            "timers": len(self._timers),
            "loop_lag_seconds": max(self._lags_s),
            "bus_frames_unread": self._node.link.unread_frames,
            "bus_frames_resent_total": self._node.link.resent_frames,
            "bus_frames_malformed_total": self._bus.frames_malformed + self._node.frames_malformed,
        }


def _end_anyway(code: int) -> None:
    """Ends the process soon, even if a thread of the executor hangs."""

    def end() -> None:
        time.sleep(2 * FORCED_CLOSE_S)
        os._exit(code)

    threading.Thread(target=end, name="end", daemon=True).start()
