"""Sees every event of a machine with its effects, and derives what is logged and recorded, and
has spans made of it."""

import logging
from collections.abc import Callable, Sequence

from slipstream.core.machine import Effect, Event, Machine, PeerDown, PeerUp, Received
from slipstream.core.span_recorder import SpanRecorder
from slipstream.runtime.record import Recorder
from slipstream.types import NodeId

log = logging.getLogger(__name__)


class Witness:
    """Stands before the machine, as a machine itself."""

    def __init__(
        self,
        machine: Machine,
        on_down: Callable[[NodeId], None],
        recorder: Recorder | None,
        spans: SpanRecorder | None = None,
    ) -> None:
        self.up: set[NodeId] = set()
        self.events = 0
        self._machine, self._on_down, self._recorder = machine, on_down, recorder
        self._spans = spans

    def handle(self, event: Event, now_s: float) -> Sequence[Effect]:
        self.events += 1
        effects: Sequence[Effect] = ()
        try:
            effects = self._machine.handle(event, now_s)
            if self._spans is not None:
                more = self._spans.saw(event, effects, now_s)
                effects = [*effects, *more] if more else effects
        except Exception:
            log.error("bug: the machine failed at %s", describe(event))
            raise
        finally:
            if self._recorder is not None:
                self._recorder.write(now_s, event, effects)
        match event:
            case PeerUp(peer, epoch):
                self.up.add(peer)
                log.debug("peer %s up, epoch %d", peer, epoch)
            case PeerDown(peer):
                self._on_down(peer)
                if peer in self.up:
                    self.up.remove(peer)
                    log.info("peer %s down", peer)
        return effects

    def statistics(self) -> dict[str, float]:
        return self._machine.statistics()

    def check(self) -> None:
        self._machine.check()


def describe(event: Event) -> str:
    """An event in words, without its contents: prompts and tokens are not for logs."""
    words = [type(event).__name__]
    about: object = event
    if isinstance(event, Received):
        about = event.message
        words += [type(event.message).__name__, "from", event.source]
    for name in ("request_id", "attempt", "peer", "key", "step"):
        if hasattr(about, name):
            words.append(f"{name}={getattr(about, name)}")
    return " ".join(words)
