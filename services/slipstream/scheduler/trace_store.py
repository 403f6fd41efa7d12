"""The traces of the latest requests, as all services have told of them.

Bounded twice, by requests and by spans; the request that was heard of first goes first.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from slipstream.spans import ProcessSpans, RequestSpans, Span, Trace, TraceContext
from slipstream.types import Epoch, NodeId, RequestId, Role

REQUESTS_KEPT = 1024
SPANS_KEPT = 65_536
REQUEST_SPANS_MAX = 512
FOUND_MAX = 128
"""Choices of one request are no more (`--max-choices`)."""
FOUND_SPANS_MAX = 8192
"""About a megabyte of an answer."""
EXPORT_AFTER_S = 2.0
"""From the frontend's last word of a request, so that the others have told theirs."""


class _Process(NamedTuple):
    node_id: NodeId
    role: Role
    epoch: Epoch


@dataclass(slots=True, eq=False)
class _Kept:
    context: TraceContext | None = None
    over: bool = False
    """Its frontend is done with it."""
    spans: dict[tuple[_Process, int], Span] = field(default_factory=dict)
    unsent: set[tuple[_Process, int]] = field(default_factory=set)
    """Ended, and not exported."""


class TraceStore:
    def __init__(self, exports: bool) -> None:
        """`exports`: whether anybody calls `due`."""
        self._exports = exports
        self._kept: OrderedDict[RequestId, _Kept] = OrderedDict()
        self._due_s: OrderedDict[RequestId, float] = OrderedDict()
        """When the unsent spans of a request are to be exported."""
        self._spans = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def any_due(self) -> bool:
        """Whether something waits to be exported."""
        return bool(self._due_s)

    def add(
        self, node_id: NodeId, role: Role, epoch: Epoch, told: RequestSpans, now_s: float
    ) -> list[Trace]:
        """What a process tells; what has to be exported at once, for it goes."""
        kept = self._kept.setdefault(told.request_id, _Kept())
        kept.context = told.context or kept.context
        kept.over = kept.over or (told.over and role is Role.FRONTEND)
        process = _Process(node_id, role, epoch)
        for span in told.spans:
            key = process, span.number
            before = kept.spans.get(key)
            if before is None:
                if len(kept.spans) >= REQUEST_SPANS_MAX:
                    continue
                self._spans += 1
            kept.spans[key] = span
            if self._exports and span.end_ns and (before is None or not before.end_ns):
                kept.unsent.add(key)
        if kept.over and kept.unsent:
            self._due_s.setdefault(told.request_id, now_s + EXPORT_AFTER_S)
        return self._make_room()

    def find(self, name: str) -> list[Trace]:
        """By a request's id, an answer's, or the `x-request-id` that is part of both."""
        asked = re.compile(rf"([a-z]+-)?{re.escape(name)}(-[0-9a-f]{{32}})?(-\d+)?")
        found: list[Trace] = []
        spans = 0
        for request_id in reversed(self._kept):  # a client may say an id twice: the latest ones
            if name in request_id and asked.fullmatch(request_id):
                kept = self._kept[request_id]
                spans += len(kept.spans)
                if len(found) == FOUND_MAX or (found and spans > FOUND_SPANS_MAX):
                    break
                found.append(_trace(request_id, kept, kept.spans))
        return found[::-1]

    def due(self, now_s: float) -> list[Trace]:
        """What is to be exported now, each span once."""
        found = []
        while self._due_s:
            request_id, due_s = next(iter(self._due_s.items()))
            if due_s > now_s:
                break
            found += self._export(request_id)
        return found

    def next_due_s(self) -> float:
        """Only if `any_due`."""
        return next(iter(self._due_s.values()))

    def check(self) -> None:
        assert len(self._kept) <= REQUESTS_KEPT
        assert self._spans == sum(len(kept.spans) for kept in self._kept.values()) <= SPANS_KEPT
        assert self._due_s.keys() <= self._kept.keys()
        for kept in self._kept.values():
            assert kept.unsent <= kept.spans.keys()

    def _export(self, request_id: RequestId) -> list[Trace]:
        self._due_s.pop(request_id, None)
        kept = self._kept[request_id]
        unsent, kept.unsent = kept.unsent, set()
        if kept.context is None or not kept.context.sampled or not unsent:
            return []
        return [_trace(request_id, kept, [key for key in kept.spans if key in unsent])]

    def _make_room(self) -> list[Trace]:
        exported = []
        while len(self._kept) > REQUESTS_KEPT or self._spans > SPANS_KEPT:
            request_id = next(iter(self._kept))
            exported += self._export(request_id)
            self._spans -= len(self._kept.pop(request_id).spans)
        return exported


def _trace(request_id: RequestId, kept: _Kept, keys: Iterable[tuple[_Process, int]]) -> Trace:
    by_process: dict[_Process, list[Span]] = {}
    for process, number in keys:
        by_process.setdefault(process, []).append(kept.spans[process, number])
    processes = [
        ProcessSpans(node_id=node_id, role=role, epoch=epoch, spans=spans)
        for (node_id, role, epoch), spans in by_process.items()
    ]
    return Trace(request_id=request_id, context=kept.context, processes=processes)
