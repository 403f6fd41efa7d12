"""GET /trace/{name}: the way of one request through all services."""

import msgspec
from aiohttp import web

from slipstream.errors import ErrorCode
from slipstream.frontend.callers import CALLER
from slipstream.frontend.calls import json_response
from slipstream.frontend.context import CONTEXT
from slipstream.frontend.problems import api_error
from slipstream.frontend.validate import shown
from slipstream.spans import ROOT, TENANT, Attributes, Trace

NAME_CHARS_MAX = 128


class SpanOut(msgspec.Struct, frozen=True, kw_only=True):
    """Times in ms from the arrival: the beginning of the request's own span, or of the first."""

    node_id: str
    role: str
    number: int
    parent: int
    """Number of a span of the same node; 0: none of them."""
    name: str
    begin_ms: float
    duration_ms: float | None
    """None: it goes on."""
    begin_unix_ns: str
    attributes: Attributes


class TraceOut(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    trace_id: str
    parent_id: str
    decision: Attributes
    spans: list[SpanOut]
    """In the order of their beginnings."""


class TracesOut(msgspec.Struct, frozen=True, kw_only=True):
    kept: int
    """Requests of which there are traces."""
    traces: list[TraceOut]
    """One for each choice."""


async def trace(request: web.Request) -> web.Response:
    """404 if there is none, or none of this client's."""
    name = request.match_info["name"]
    if not 0 < len(name) <= NAME_CHARS_MAX:
        raise api_error(ErrorCode.TRACE_NOT_FOUND, f"No request is called {shown(name)}.")
    found = await request.app[CONTEXT].gateway.trace(name)
    if found is None:
        raise api_error(ErrorCode.NOT_READY, "The scheduler, who keeps the traces, is silent.")
    caller = request[CALLER]
    seen = [one for one in found.traces if caller.operator or _tenant(one) == caller.tenant]
    if not seen:
        raise api_error(
            ErrorCode.TRACE_NOT_FOUND,
            f"No trace of {shown(name)}; those of the last {found.kept} requests are kept.",
        )
    response = json_response(TracesOut(kept=found.kept, traces=[_trace(one) for one in seen]))
    response.headers["Cache-Control"] = "no-store"
    return response


def _tenant(trace: Trace) -> str | None:
    """None: its frontend has not said whose it is."""
    roots = [s for process in trace.processes for s in process.spans if s.name == ROOT]
    return str(roots[0].attributes.get(TENANT, "")) if roots else None


def _trace(trace: Trace) -> TraceOut:
    pairs = [(process, span) for process in trace.processes for span in process.spans]
    firsts = [span.begin_ns for _, span in pairs]
    arrival_ns = next((s.begin_ns for _, s in pairs if s.name == ROOT), min(firsts, default=0))
    spans = [
        SpanOut(
            node_id=process.node_id,
            role=process.role.value,
            number=span.number,
            parent=span.parent,
            name=span.name,
            begin_ms=(span.begin_ns - arrival_ns) / 1e6,
            duration_ms=(span.end_ns - span.begin_ns) / 1e6 if span.end_ns else None,
            begin_unix_ns=str(span.begin_ns),
            attributes=span.attributes,
        )
        for process, span in pairs
    ]
    context = trace.context
    return TraceOut(
        request_id=trace.request_id,
        trace_id=context.trace_id if context else "",
        parent_id=context.parent_id if context else "",
        decision=trace.decision,
        spans=sorted(spans, key=lambda span: (span.begin_ms, -(span.duration_ms or 1e12))),
    )
