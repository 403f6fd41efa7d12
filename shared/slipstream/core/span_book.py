"""Spans of the requests that a process has to do with, until they are told.

Bounded in every direction: what does not fit is left out, and nobody waits for it.
"""

from collections import OrderedDict, deque
from collections.abc import KeysView, Mapping
from dataclasses import dataclass, field

from slipstream.spans import Attribute, Attributes, RequestSpans, Span, TraceContext
from slipstream.types import RequestId

SPANS_MAX = 128
"""Of one request in one process."""
LIVE_MAX = 8192
"""Requests that are not over; beyond, the oldest one counts as over."""
OVER_MAX = 1024
"""Requests that are over and not told, because the scheduler is away or many ended at once."""
LONG_S = 5.0
"""A request that lasts so long is told of while it lasts, and again each time so much later."""

_NOTHING: Mapping[str, Attribute] = {}


@dataclass(slots=True, eq=False)
class _Span:
    number: int
    name: str
    begin_s: float
    parent: int
    attributes: Attributes
    end_s: float | None = None
    changed: bool = True
    """Since it was told."""


@dataclass(slots=True, eq=False)
class _Entry:
    request_id: RequestId
    tell_s: float
    context: TraceContext | None
    spans: list[_Span] = field(default_factory=list)
    open: dict[str, _Span] = field(default_factory=dict)
    left_out: int = 0
    over: bool = False
    offset_ns: int | None = None
    """Wall clock less ours when it was first told of: so two tellings fit together."""


class SpanBook:
    """Words about requests that are not in it are passed over, so that nobody has to ask."""

    def __init__(self) -> None:
        self._live: OrderedDict[RequestId, _Entry] = OrderedDict()
        self._over: deque[_Entry] = deque(maxlen=OVER_MAX)
        self._number = 0

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._live

    @property
    def live(self) -> KeysView[RequestId]:
        """Requests that are not over."""
        return self._live.keys()

    @property
    def any_over(self) -> bool:
        return bool(self._over)

    def open(
        self, request_id: RequestId, now_s: float, context: TraceContext | None = None
    ) -> None:
        """The process has to do with it from now on, unless it has already."""
        if request_id in self._live:
            return
        if len(self._live) >= LIVE_MAX:
            self._end(next(iter(self._live)))
        self._live[request_id] = _Entry(request_id, now_s + LONG_S, context)

    def begin(
        self,
        request_id: RequestId,
        name: str,
        now_s: float,
        under: str = "",
        said: Mapping[str, Attribute] = _NOTHING,
    ) -> None:
        """`under`: name of an open span; without one, the request's root. One span of a name is
        open at a time."""
        entry = self._live.get(request_id)
        if entry is not None and name not in entry.open:
            span = self._new(entry, name, now_s, under, said)
            if span is not None:
                entry.open[name] = span

    def end(
        self,
        request_id: RequestId,
        name: str,
        now_s: float,
        said: Mapping[str, Attribute] = _NOTHING,
    ) -> None:
        entry = self._live.get(request_id)
        span = entry.open.pop(name, None) if entry is not None else None
        if span is not None:
            span.end_s, span.changed = now_s, True
            span.attributes.update(said)

    def add(
        self,
        request_id: RequestId,
        name: str,
        begin_s: float,
        end_s: float,
        under: str = "",
        said: Mapping[str, Attribute] = _NOTHING,
    ) -> None:
        """One that is known when it is over."""
        entry = self._live.get(request_id)
        span = self._new(entry, name, begin_s, under, said) if entry is not None else None
        if span is not None:
            span.end_s = end_s

    def say(self, request_id: RequestId, name: str, said: Mapping[str, Attribute]) -> None:
        """More about an open span."""
        span = self._open(request_id, name)
        if span is not None:
            span.attributes.update(said)
            span.changed = True

    def said(self, request_id: RequestId, name: str, key: str) -> Attribute | None:
        """What was said about an open span."""
        span = self._open(request_id, name)
        return span.attributes.get(key) if span is not None else None

    def is_open(self, request_id: RequestId, name: str) -> bool:
        return self._open(request_id, name) is not None

    def close(self, request_id: RequestId, now_s: float) -> None:
        """The process is done with it: what is open ends now."""
        entry = self._live.get(request_id)
        if entry is None:
            return
        for span in entry.open.values():
            span.end_s, span.changed = now_s, True
        entry.open.clear()
        self._end(request_id)

    def close_all(self, now_s: float) -> None:
        for request_id in list(self._live):
            self.close(request_id, now_s)

    def take(self, now_s: float, offset_ns: int, *, young: bool = False) -> list[RequestSpans]:
        """What is to be told now: all that is over, and news of what lasts. `young`: also of what
        has just begun. `offset_ns`: wall clock less our clock."""
        due = [entry for entry in self._live.values() if young or entry.tell_s <= now_s]
        for entry in due:
            entry.tell_s = now_s + LONG_S
        told = [_told(entry, offset_ns) for entry in (*self._over, *due)]
        self._over.clear()
        return [request for request in told if request.spans or request.over]

    def check(self) -> None:
        assert len(self._live) <= LIVE_MAX
        for request_id, entry in self._live.items():
            assert request_id == entry.request_id and not entry.over
            assert len(entry.spans) <= SPANS_MAX
            assert all(span in entry.spans for span in entry.open.values())

    def _new(
        self, entry: _Entry, name: str, begin_s: float, under: str, said: Mapping[str, Attribute]
    ) -> _Span | None:
        if len(entry.spans) >= SPANS_MAX:
            entry.left_out += 1
            return None
        parent = entry.open.get(under)
        self._number += 1
        number = 0 if parent is None else parent.number
        span = _Span(self._number, name, begin_s, number, dict(said))
        entry.spans.append(span)
        return span

    def _open(self, request_id: RequestId, name: str) -> _Span | None:
        entry = self._live.get(request_id)
        return None if entry is None else entry.open.get(name)

    def _end(self, request_id: RequestId) -> None:
        entry = self._live.pop(request_id)
        entry.over = True
        if entry.left_out and entry.spans:
            entry.spans[0].attributes["spans_left_out"] = entry.left_out
            entry.spans[0].changed = True
        self._over.append(entry)


def _told(entry: _Entry, now_offset_ns: int) -> RequestSpans:
    offset_ns = entry.offset_ns = now_offset_ns if entry.offset_ns is None else entry.offset_ns
    spans = []
    for span in entry.spans:
        if not span.changed:
            continue
        span.changed = False
        spans.append(
            Span(
                number=span.number,
                name=span.name,
                begin_ns=offset_ns + round(span.begin_s * 1e9),
                end_ns=0 if span.end_s is None else offset_ns + round(span.end_s * 1e9),
                parent=span.parent,
                attributes=dict(span.attributes),
            )
        )
    return RequestSpans(
        request_id=entry.request_id, spans=spans, over=entry.over, context=entry.context
    )
