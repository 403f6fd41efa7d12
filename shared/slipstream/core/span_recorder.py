"""Stands beside a machine, sees each event with its effects, and makes spans of them.

The machine knows nothing of it. A recorder is as pure as a machine: what it has to say are effects
too. It looks things up by their type, so that what it does not care for costs next to nothing; no
recorder does anything for each token.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from slipstream.core.machine import (
    Effect,
    Event,
    Exit,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    TimerFired,
)
from slipstream.core.span_book import LONG_S, SpanBook
from slipstream.messages import SCHEDULER, Message, NodeInfo, Spans
from slipstream.types import NodeId

SPANS_TIMER = "spans"
TELL_S = 0.2
"""From a request's end until it is told of; others that end in between go with it."""
MESSAGE_REQUESTS_MAX = 64

Said: TypeAlias = dict[type[Message], Callable[[NodeId, Any], None]]


class SpanRecorder:
    """Subclasses fill the four tables. `now_s`, `event` and `effects` are those of the moment, and
    what is put into `more` is done after the machine's effects."""

    def __init__(self, node: NodeInfo, wall_offset_ns: Callable[[], int]) -> None:
        """`wall_offset_ns`: wall clock less the clock of `now_s`."""
        self.node, self.book = node, SpanBook()
        self.heard: Said = {}
        """By type of the message that came, with who sent it."""
        self.happened: dict[type[Any], Callable[[Any], None]] = {}
        """By type of any other event."""
        self.sent: Said = {}
        self.done: dict[type[Any], Callable[[Any], None]] = {}
        """By type of any other effect."""
        self.now_s = 0.0
        self.event: Event | None = None
        self.effects: Sequence[Effect] = ()
        self.more: list[Effect] = []
        self._wall_offset_ns = wall_offset_ns
        self._scheduler_up = False
        self._due_s = math.inf

    def saw(self, event: Event, effects: Sequence[Effect], now_s: float) -> list[Effect]:
        """To be called for every event; what is to be done beside the effects."""
        self.now_s, self.event, self.effects, self.more = now_s, event, effects, []
        self._see(event)
        leaves = False
        for effect in effects:
            if type(effect) is Send:
                said = self.sent.get(type(effect.message))
                if said is not None:
                    said(effect.to, effect.message)
            else:
                leaves = leaves or type(effect) is Exit
                done = self.done.get(type(effect))
                if done is not None:
                    done(effect)
        if leaves:
            self.book.close_all(now_s)
            self.tell()
        self._set_timer()
        return self.more

    def tell(self) -> None:
        """What there is to tell goes to the scheduler, or waits until it is there."""
        if not self._scheduler_up:
            return
        told = self.book.take(self.now_s, self._wall_offset_ns())
        for start in range(0, len(told), MESSAGE_REQUESTS_MAX):
            requests = told[start : start + MESSAGE_REQUESTS_MAX]
            spans = Spans(role=self.node.role, epoch=self.node.epoch, requests=requests)
            self.more.append(Send(SCHEDULER, spans))

    def check(self) -> None:
        self.book.check()

    def _see(self, event: Event) -> None:
        match event:
            case Received(source, message):
                heard = self.heard.get(type(message))
                if heard is not None:
                    heard(source, message)
                return
            case TimerFired(key) if key == SPANS_TIMER:
                self._due_s = math.inf
                self.tell()
                return
            case PeerUp(peer, _) if peer == SCHEDULER:
                self._scheduler_up = True
            case PeerDown(peer) if peer == SCHEDULER:
                self._scheduler_up = False
        happened = self.happened.get(type(event))
        if happened is not None:
            happened(event)

    def _set_timer(self) -> None:
        if self.book.any_over and self._scheduler_up:
            due_s = self.now_s + TELL_S
        elif self.book.any_over or self.book.live:
            due_s = self.now_s + LONG_S
        else:
            return
        if due_s < self._due_s:
            self._due_s = due_s
            self.more.append(SetTimer(SPANS_TIMER, due_s))
