"""A node without a process of its own: its machine and sessions on a loop that others share."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable

from slipstream.core.link import Transmit
from slipstream.core.machine import (
    CancelTimer,
    Effect,
    Event,
    Exit,
    Machine,
    Note,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.core.node import Action, Node, encode_header
from slipstream.messages import SCHEDULER, NodeInfo
from slipstream.runtime.timers import Timers
from slipstream.types import NodeId, Role

DEAD_S = 3600.0
"""No peer falls silent alone: they end together."""
_LOG = logging.getLogger(__name__)


class Network:
    """Frames go to the process whose address is the node's name, in order, and none is lost."""

    def __init__(self, loop: asyncio.AbstractEventLoop, failed: Callable[[BaseException], None]):
        """`failed` is told once why nothing goes on any more."""
        self.loop, self.failed = loop, failed
        self.processes: dict[NodeId, Process] = {}

    def transmit(self, frame: Transmit) -> None:
        if (process := self.processes.get(frame.address)) is not None:
            header = encode_header(frame.header)
            self.loop.call_soon(process.receive, header, frame.payload)


class Process:
    def __init__(
        self,
        network: Network,
        info: NodeInfo,
        machine: Machine,
        execute: Callable[[Effect], None] | None = None,
    ) -> None:
        """`execute`: of effects that are neither words nor timers; it must not block."""
        self._network, self._execute = network, execute
        scheduler = None if info.role is Role.SCHEDULER else (SCHEDULER, SCHEDULER)
        self._node = Node(info, machine, scheduler, DEAD_S)
        self._timers = Timers()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = math.inf
        self._name = info.node_id
        network.processes[info.node_id] = self
        self.post(Started())

    def post(self, event: Event) -> None:
        """From any thread."""
        self._network.loop.call_soon_threadsafe(
            self._run, lambda now_s: self._node.handle(event, now_s)
        )

    def receive(self, header: bytes, payload: bytes) -> None:
        self._run(lambda now_s: self._node.receive(header, payload, None, now_s))

    def _run(self, step: Callable[[float], Iterable[Action]]) -> None:
        try:
            for action in step(time.monotonic()):
                self._perform(action)
        except Exception as error:  # noqa: BLE001 a bug: the machine may be half changed and must not go on
            _LOG.exception("%s", self._name)
            self._network.failed(error)
        self._set_alarm()

    def _perform(self, action: Action) -> None:
        match action:
            case Transmit():
                self._network.transmit(action)
            case SetTimer(key, at_s):
                self._timers.set(key, at_s)
            case CancelTimer(key):
                self._timers.cancel(key)
            case Note(text):
                _LOG.info("%s: %s", self._name, text)
            case Exit(fault):
                self._network.failed(RuntimeError(f"{self._name} has ended: {fault or 'drained'}"))
            case _:
                assert self._execute is not None, f"no executor for {type(action).__name__}"
                self._execute(action)

    def _set_alarm(self) -> None:
        at_s = min(self._timers.next_s(), self._node.next_wake_s())
        if at_s < self._alarm_s:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_s = at_s
            delay_s = max(0.0, at_s - time.monotonic())
            self._alarm = self._network.loop.call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._alarm, self._alarm_s = None, math.inf
        now_s = time.monotonic()
        for key in self._timers.due(now_s):
            self._run(lambda now_s, key=key: self._node.handle(TimerFired(key), now_s))  # type: ignore[misc]
        self._run(self._node.wake)
