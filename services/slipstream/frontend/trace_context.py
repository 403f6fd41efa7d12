"""W3C Trace Context: which trace a request belongs to, as its client says in `traceparent`."""

import re
import uuid

from aiohttp import web

from slipstream.spans import TraceContext

STATE_CHARS_MAX = 512
"""Of `tracestate`; a longer one may be left out, and is."""

_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
_SAMPLED = 0x01


def trace_context(request: web.Request) -> TraceContext:
    """One that is not valid is passed over in silence, as the specification has it, and its
    `tracestate` with it: then the trace is a new one."""
    parents = request.headers.getall("traceparent", [])
    found = _PARENT.fullmatch(parents[0].strip()) if len(parents) == 1 else None
    if found is None or not _valid(found):
        return TraceContext(trace_id=uuid.uuid4().hex)
    return TraceContext(
        trace_id=found["trace"],
        parent_id=found["parent"],
        sampled=bool(int(found["flags"], 16) & _SAMPLED),
        state=_state(request.headers.getall("tracestate", [])),
    )


def _valid(found: re.Match[str]) -> bool:
    """Versions that are yet to come may have more behind; version 0 has nothing."""
    if found["version"] == "ff" or (found["version"] == "00" and found["more"]):
        return False
    return bool(int(found["trace"], 16) and int(found["parent"], 16))


def _state(lines: list[str]) -> str:
    state = ",".join(filter(None, (line.strip() for line in lines)))
    usable = len(state) <= STATE_CHARS_MAX and state.isascii() and state.isprintable()
    return state if usable else ""
