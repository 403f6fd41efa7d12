"""Spans as OTLP says them, for `POST /v1/traces`. The messages are opentelemetry-proto's."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from slipstream.config import SetupError
from slipstream.spans import ROOT, Attribute, Attributes, ProcessSpans, Span, Trace
from slipstream.types import NodeId, Role

_LISTS = frozenset({"gen_ai.response.finish_reasons"})
"""Attributes that OpenTelemetry has as lists."""


class Proto(NamedTuple):
    """The generated modules."""

    service: Any
    trace: Any
    common: Any


def load_proto(prog: str = "slipstream scheduler") -> Proto:
    """SetupError if the package is not there, in the name of `prog`."""
    try:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
        from opentelemetry.proto.common.v1 import common_pb2
        from opentelemetry.proto.trace.v1 import trace_pb2
    except ImportError:
        raise SetupError(
            f"{prog}: --otlp-endpoint needs opentelemetry-proto; install 'slipstream[otel]'"
        ) from None
    return Proto(trace_service_pb2, trace_pb2, common_pb2)


def count_spans(trace: Trace) -> int:
    return sum(len(process.spans) for process in trace.processes)


def encode(proto: Proto, traces: Iterable[Trace]) -> bytes:
    """One request body: a resource for each process."""
    resources: dict[tuple[NodeId, Role, int], Any] = {}
    request = proto.service.ExportTraceServiceRequest()
    for trace in traces:
        for process in trace.processes:
            key = process.node_id, process.role, process.epoch
            if key not in resources:
                resources[key] = _resource(request, process)
            for span in process.spans:
                _fill(proto, resources[key].spans.add(), trace, process, span)
    body: bytes = request.SerializeToString()
    return body


def span_id(trace: Trace, process: ProcessSpans, span: Span) -> bytes:
    """The same whoever asks, and whenever: 8 bytes that are not all zero."""
    if process.role is Role.FRONTEND and span.name == ROOT and not span.parent:
        return _root_id(trace)
    return _id(f"{trace.request_id} {process.node_id} {process.epoch} {span.number}")


def _root_id(trace: Trace) -> bytes:
    return _id(trace.request_id)


def _id(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def _resource(request: Any, process: ProcessSpans) -> Any:
    resource = request.resource_spans.add()
    said: Attributes = {
        "service.name": f"slipstream-{process.role}",
        "service.namespace": "slipstream",
        "service.instance.id": process.node_id,
    }
    _say(resource.resource.attributes, said)
    scope = resource.scope_spans.add()
    scope.scope.name = "slipstream"
    return scope


def _fill(proto: Proto, out: Any, trace: Trace, process: ProcessSpans, span: Span) -> None:
    context = trace.context
    assert context is not None
    out.trace_id = bytes.fromhex(context.trace_id)
    out.span_id = span_id(trace, process, span)
    out.trace_state = context.state
    out.start_time_unix_nano, out.end_time_unix_nano = span.begin_ns, span.end_ns
    out.flags = 1  # sampled
    root = out.span_id == _root_id(trace)
    if root:
        out.name = _name(span)
        out.kind = proto.trace.Span.SPAN_KIND_SERVER
        out.parent_span_id = bytes.fromhex(context.parent_id)
    else:
        out.name = span.name
        out.kind = proto.trace.Span.SPAN_KIND_INTERNAL
        parent = Span(number=span.parent, name="", begin_ns=0)
        out.parent_span_id = span_id(trace, process, parent) if span.parent else _root_id(trace)
    _say(out.attributes, {"slipstream.request_id": trace.request_id, **_named(span.attributes)})
    if "error.type" in span.attributes:
        out.status.code = proto.trace.Status.STATUS_CODE_ERROR
        out.status.message = str(span.attributes["error.type"])


def _name(span: Span) -> str:
    """As GenAI's conventions have it: what is done, and with which model."""
    words = [span.attributes.get(f"gen_ai.{key}") for key in ("operation.name", "request.model")]
    return " ".join(str(word) for word in words if word) or span.name


def _named(said: Attributes) -> Attributes:
    """What is ours alone is called so."""
    return {
        key if key.startswith(("gen_ai.", "error.")) else f"slipstream.{key}": value
        for key, value in said.items()
    }


def _say(out: Any, said: Attributes) -> None:
    for key, value in said.items():
        entry = out.add()
        entry.key = key
        into = entry.value.array_value.values.add() if key in _LISTS else entry.value
        _set(into, value)


def _set(out: Any, value: Attribute) -> None:
    if isinstance(value, bool):
        out.bool_value = value
    elif isinstance(value, int):
        out.int_value = value
    elif isinstance(value, float):
        out.double_value = value
    else:
        out.string_value = value
