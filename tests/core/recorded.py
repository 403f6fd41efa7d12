"""A machine under test with its recorder beside it, as a shell has it."""

from collections.abc import Sequence
from typing import Any

from slipstream.core.machine import Effect, Event
from slipstream.core.span_recorder import SpanRecorder
from slipstream.spans import Span


def beside(machine: Any, spans: SpanRecorder) -> None:
    """From now on the machine's effects are those of both."""
    handle = machine.handle

    def both(event: Event, now_s: float) -> Sequence[Effect]:
        effects = handle(event, now_s)
        more = spans.saw(event, effects, now_s)
        spans.check()
        return [*effects, *more]

    machine.handle = both


def tree(spans: Sequence[Span]) -> list[tuple[str, str]]:
    """(parent's name, name), in order of beginning and number."""
    names = {span.number: span.name for span in spans} | {0: ""}
    ordered = sorted(spans, key=lambda span: (span.begin_ns, span.number))
    return [(names[span.parent], span.name) for span in ordered]


def named(spans: Sequence[Span]) -> dict[str, Span]:
    """The last one of each name."""
    return {span.name: span for span in spans}


def ms(span: Span) -> tuple[float, float]:
    """Beginning and length."""
    return span.begin_ns / 1e6, (span.end_ns - span.begin_ns) / 1e6
