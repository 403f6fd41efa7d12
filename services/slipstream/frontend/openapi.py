"""GET /openapi.json: the document of the API, made of the structs that decode and encode it."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from slipstream.errors import ERRORS, ErrorCode
from slipstream.frontend import anthropic_errors
from slipstream.frontend.anthropic_shapes import AnthropicErrorReply
from slipstream.frontend.api_table import OPERATIONS, Body, Operation, limits
from slipstream.frontend.context import CONTEXT
from slipstream.frontend.event_ids import HEADER, ID_PATTERN
from slipstream.frontend.info_shapes import Readiness
from slipstream.frontend.validate import Limits

REF = "#/components/schemas/{name}"
JSON, SSE = "application/json", "text/event-stream"
PROBES = ("/health", "/readyz")
HEADERS = {"x-request-id": {"schema": {"type": "string"}}}
WAITS = {
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."},
    "retry-after-ms": {"schema": {"type": "integer"}},
}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
"""Of servers with --api-keys-file."""
ASKS = [
    {"name": "X-Request-Id", "in": "header", "schema": {"type": "string"}},
    {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "schema": {"type": "integer", "minimum": 1, "maximum": 86_400_000},
    },
]
GOES_ON = {"name": HEADER, "in": "header", "schema": {"type": "string", "pattern": ID_PATTERN}}


async def openapi(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = encoded(context.version, context.limits)
    return web.Response(body=body, content_type=JSON)


@functools.lru_cache(maxsize=1)
def encoded(version: str, given: Limits) -> bytes:
    return msgspec.json.encode(document(version, given))


def document(version: str, given: Limits) -> dict[str, Any]:
    """OpenAPI 3.1."""
    types = _types()
    schemas, components = msgspec.json.schema_components(types, ref_template=REF)
    found = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    facets = limits(given)
    for operation in OPERATIONS:
        if operation.body is not None:
            _narrow(components[operation.body.shape.__name__], operation.body, facets)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        said = _operation(operation, found)
        paths.setdefault(operation.path, {})[operation.method.lower()] = said
    return {
        "openapi": "3.1.0",
        "info": {"title": "Slipstream", "version": version},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": SCHEMES},
        "security": [{}, *({name: []} for name in SCHEMES)],
    }


def _types() -> list[Any]:
    types: list[Any] = [AnthropicErrorReply]
    for operation in OPERATIONS:
        types += [operation.reply, operation.events, operation.body and operation.body.shape]
    return list({id(t): t for t in types if t is not None and not isinstance(t, str)}.values())


def _narrow(component: dict[str, Any], body: Body, facets: Mapping[str, dict[str, Any]]) -> None:
    """What the types do not say: ranges, and members that are known and not served."""
    properties = component["properties"]
    for name, schema in properties.items():
        own = f"{body.shape.__name__}.{name}"
        schema.update(facets.get(own, facets.get(name, {})))
    for name in body.refused.__struct_fields__ if body.refused else ():
        if name == "best_of":
            properties[name] = {"type": ["integer", "null"], "description": "As n, or refused."}
        else:
            properties[name] = {"enum": [None, *body.neutral.get(name, ())]}
    for name, why in body.ignored.items():
        properties.setdefault(name, {"description": f"Ignored: {why}."})


def _operation(operation: Operation, schemas: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    said: dict[str, Any] = {"summary": f"{operation.does[:1].upper()}{operation.does[1:]}."}
    parameters = [*_parameters(operation), *(ASKS if operation.body else ASKS[:1])]
    streams = operation.events is not None
    said["parameters"] = [*parameters, GOES_ON] if streams else parameters
    if operation.body is not None:
        schema = schemas[id(operation.body.shape)]
        said["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    said["responses"] = {**_reply(operation, schemas), **_errors(operation, schemas)}
    return said


def _parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    for piece in operation.path.split("/"):
        if piece.startswith("{"):
            schema = {"type": "string"}
            yield {"name": piece[1:-1], "in": "path", "required": True, "schema": schema}
    for name, schema in operation.query.items():
        yield {"name": name, "in": "query", "schema": schema}


def _reply(operation: Operation, schemas: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    if operation.reply is None:
        return {}
    content: dict[str, Any]
    if isinstance(operation.reply, str):
        content = {operation.reply: {}}
    else:
        content = {JSON: {"schema": schemas[id(operation.reply)]}}
    if operation.path == "/":
        content["text/html"] = {}
    if operation.events is not None:
        # The data of each event; what stands around it no schema can say.
        content[SSE] = {"schema": schemas[id(operation.events)]}
    return {"200": {"description": "Done.", "headers": HEADERS, "content": content}}


def _errors(operation: Operation, schemas: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    by_status: dict[int, list[ErrorCode]] = {}
    for code in dict.fromkeys(operation.codes):
        by_status.setdefault(ERRORS[code].status, []).append(code)
    found = {}
    for status, codes in sorted(by_status.items()):
        if anthropic_errors.is_ours(operation.path):
            schema = schemas[id(AnthropicErrorReply)]
        else:
            schema = _error_schema(codes)
        found[str(status)] = {
            "description": " ".join(ERRORS[code].meaning for code in codes),
            "headers": HEADERS | (WAITS if status in (429, 503) else {}),
            "content": {JSON: {"schema": schema}},
        }
    if operation.path in PROBES:
        said = {"schema": schemas[id(Readiness)]}
        found["503"] = {"description": "Not now.", "headers": HEADERS, "content": {JSON: said}}
    return found


def _error_schema(codes: Iterable[ErrorCode]) -> dict[str, Any]:
    members = {
        "message": {"type": "string"},
        "type": {"enum": sorted({ERRORS[code].type for code in codes})},
        "param": {"type": ["string", "null"]},
        "code": {"enum": [code.value for code in codes]},
    }
    error = {"type": "object", "properties": members, "required": list(members)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
