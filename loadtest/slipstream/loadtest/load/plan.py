"""Where a run stands: a machine that is told the time and how much is in flight. Pure."""

import msgspec

from slipstream.loadtest.load.scenarios import Phase


class Span(msgspec.Struct, frozen=True):
    """A phase that has been, or is; seconds from the beginning of the run."""

    phase: Phase
    begin_s: float
    end_s: float


class Plan:
    """Parts of phases; between parts the run waits until nothing is in flight any more."""

    def __init__(self, parts: list[list[Phase]], drain_s: float) -> None:
        self._parts, self._drain_s = parts, drain_s
        self._part = -1
        self._end_s = 0.0
        """Of the present part, without its drain."""
        self.spans: list[Span] = []
        self.over = False

    @property
    def part(self) -> list[Phase]:
        return self._parts[self._part]

    @property
    def begin_s(self) -> float:
        """Of the present part."""
        return self._end_s - sum(phase.duration_s for phase in self.part)

    def advance(self, now_s: float, in_flight: int) -> None:
        """To be called again and again, also before anything is asked."""
        if self.over or (self._part >= 0 and self.asks(now_s)):
            return
        waits = in_flight and now_s < self._end_s + self._drain_s
        if self._part >= 0 and waits:
            return
        if self._part + 1 == len(self._parts):
            self.over = True
            return
        self._part += 1
        for phase in self.part:
            self.spans.append(Span(phase, now_s, now_s + phase.duration_s))
            now_s += phase.duration_s
        self._end_s = now_s

    def asks(self, now_s: float) -> bool:
        """Whether new requests are sent."""
        return not self.over and now_s < self._end_s

    def phase_name(self, now_s: float) -> str:
        """Of the phase that has begun last: the drain belongs to it."""
        begun = [span.phase.name for span in self.spans if span.begin_s <= now_s]
        return begun[-1] if begun else ""
