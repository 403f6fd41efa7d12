"""What the services tell of one request's way: spans, and the trace that they make up together.

A span is named by its number, which no other span of the same process (node id and epoch) has.
"""

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from slipstream.types import Epoch, NodeId, RequestId, Role

Attribute: TypeAlias = str | int | float | bool
Attributes: TypeAlias = dict[str, Attribute]

ROOT = "request"
"""Name of the span that holds all others; the frontend's."""
TENANT = "tenant"
"""Its attribute: the name of the API key, where one was shown."""


class TraceContext(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the client's `traceparent` and `tracestate` said, or an id of ours."""

    trace_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    parent_id: Annotated[str, Meta(pattern="^([0-9a-f]{16})?$")] = ""
    """The client's span; empty: it named none."""
    sampled: bool = True
    state: str = ""
    """`tracestate`, as it came."""


class Span(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Times are of the process's wall clock."""

    number: int
    name: str
    begin_ns: int
    end_ns: int = 0
    """0: it goes on."""
    parent: int = 0
    """Number of a span of the same process; 0: the request's `ROOT`."""
    attributes: Attributes = {}


class RequestSpans(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a process has to tell of one request. A span that was told before is told again when it
    has changed."""

    request_id: RequestId
    spans: list[Span]
    over: bool = False
    """The process is done with the request."""
    context: TraceContext | None = None
    """Of the frontend."""


class ProcessSpans(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    node_id: NodeId
    role: Role
    epoch: Epoch
    spans: list[Span]


class Trace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice of a request, as far as it has been told of."""

    request_id: RequestId
    context: TraceContext | None = None
    """None: its frontend has said nothing so far."""
    processes: list[ProcessSpans]
    decision: Attributes = {}
    """The scheduler's record of its last placement."""
