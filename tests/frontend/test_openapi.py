"""The OpenAPI document is what the server does: routes, limits, answers and refusals."""

import json
import re
from collections.abc import Iterator
from typing import Any, cast

import jsonschema
import pytest

from frontend.catalogue import ACCEPTED, CHAT, COMPLETE, REFUSED
from frontend.fakes import MODEL, FakeGateway, Server, call, chat_body, parted, speak, think
from slipstream.errors import ERRORS, ErrorCode, Problem
from slipstream.frontend.api_table import OPERATIONS, limits
from slipstream.frontend.app import AppSettings, build_app
from slipstream.frontend.gateway import Gateway
from slipstream.frontend.openapi import document
from slipstream.frontend.validate import Limits

LIMITS = Limits(max_body_bytes=100_000)
DOCUMENT = document("0", LIMITS)
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat_body(),
    COMPLETE: {"model": MODEL, "prompt": "Hi"},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
    "/v1/responses/input_tokens": {"model": MODEL, "input": "Hi"},
    "/v1/messages": {**chat_body(), "max_tokens": 8},
    "/v1/messages/count_tokens": chat_body(),
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


def validate(value: Any, schema: dict[str, Any]) -> None:
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


async def check(response: Any, path: str) -> Any:
    """Status, media type and body are those of the document."""
    said = DOCUMENT["paths"][path][response.method.lower()]["responses"][str(response.status)]
    kind = response.content_type
    text = await response.text()
    assert kind in said["content"] or "*/*" in said["content"], (kind, path)
    assert (
        not said.get("headers", {}).keys()
        - {h.lower() for h in response.headers}
        - {*("Retry-After", "retry-after-ms")}
    )
    schema = said["content"].get(kind, {}).get("schema")
    if kind == "text/event-stream":
        for data in re.findall("^data: (.*)$", text, re.MULTILINE):
            if data != "[DONE]":
                validate(json.loads(data), schema)
    elif schema is not None:
        validate(json.loads(text), schema)


def test_routes() -> None:
    app = build_app(cast(Gateway, FakeGateway()), AppSettings())
    served = {
        (route.method, re.sub(r":[^}]*", "", route.resource.canonical))
        for route in app.router.routes()
        if route.resource and route.method != "HEAD"
    }
    assert {(one.method, one.path) for one in OPERATIONS} == served


def test_every_schema_is_one() -> None:
    text = json.dumps(DOCUMENT)
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    named = set(re.findall(r'"#/components/schemas/([^"]*)"', text))
    assert named <= DOCUMENT["components"]["schemas"].keys()
    for item in DOCUMENT["paths"].values():
        for operation in item.values():
            assert all(0 < int(status) < 600 for status in operation["responses"])


async def test_it_is_served(server: Server) -> None:
    response = await server.client.get(server.url + "/openapi.json")
    said = await response.json()
    said["info"]["version"] = "0"
    assert said == DOCUMENT


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals(server: Server, name: str) -> None:
    (path, body), *_ = REFUSED[name]
    response = await server.post(path, body)
    if path in DOCUMENT["paths"]:
        await check(response, path)


@pytest.mark.parametrize("name", ACCEPTED)
async def test_what_is_let_in_is_of_the_schema(server: Server, name: str) -> None:
    path, body = ACCEPTED[name]
    response = await server.post(path, body)
    assert response.status == 200
    await check(response, path)
    given = json.loads(body) if isinstance(body, bytes) else body
    validate(given, _schema_of(path))


def _schema_of(path: str) -> dict[str, Any]:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    return dict(content["application/json"]["schema"])


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_answers(server: Server, path: str, stream: bool) -> None:
    server.gateway.script = lambda s: parted(s, [think("a")], [speak("b"), *call("f", "{}")])
    body = BODIES[path] | ({"stream": True} if stream else {})
    response = await server.post(path, body)
    assert response.status == 200, await response.text()
    await check(response, path)
    validate(body, _schema_of(path))


@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("code", [code for code in ErrorCode if ERRORS[code].status >= 429])
async def test_failures(server: Server, path: str, code: ErrorCode) -> None:
    server.gateway.refuse(Problem(code=code, message="No."))
    response = await server.post(path, BODIES[path])
    assert response.status == ERRORS[code].status
    await check(response, path)


async def test_paths_that_are_got(server: Server) -> None:
    made = await (await server.post("/v1/responses", BODIES["/v1/responses"])).json()
    names = {
        "id": [made["id"], "resp_none"],
        "model": [MODEL, "none"],
        "name": ["style.css", "none"],
    }
    for operation in OPERATIONS:
        if operation.method != "GET":
            continue
        field = re.search(r"\{(\w+)\}", operation.path)
        for value in names[field[1]] if field else [""]:
            path = re.sub(r"\{\w+\}", value, operation.path)
            await check(await server.client.get(server.url + path), operation.path)
    for method, path in (("POST", "cancel"), ("DELETE", ""), ("DELETE", "")):
        url = f"{server.url}/v1/responses/{made['id']}/{path}".rstrip("/")
        response = await server.client.request(method, url)
        await check(response, f"/v1/responses/{{id}}/{path}".rstrip("/"))


@pytest.mark.parametrize("path", BODIES)
async def test_bodies_that_are_no_json(server: Server, path: str) -> None:
    for data, headers in (
        (b"{", {}),
        (b"{}", {"Content-Type": "text/plain"}),
        (b"x" * 200_000, {}),
    ):
        response = await server.post(path, data, **headers)
        assert response.status in (400, 413, 415)
        await check(response, path)


async def test_not_ready(server: Server) -> None:
    server.gateway.now = type(server.gateway.now)(
        ready=False, reason="no worker", refuses="no worker"
    )
    for path, body in BODIES.items():
        response = await server.post(path, body)
        assert response.status == 503
        await check(response, path)
    for path in ("/health", "/readyz"):
        await check(await server.client.get(server.url + path), path)


def beyond() -> Iterator[Any]:
    """Each limit of each body, and a value just outside."""
    facets = limits(LIMITS)
    for operation in OPERATIONS:
        if operation.body is None:
            continue
        shape, refused = operation.body.shape, operation.body.refused
        for name in shape.__struct_fields__:
            if refused and name in refused.__struct_fields__:
                continue
            said = facets.get(f"{shape.__name__}.{name}", facets.get(name, {}))
            for word, limit in said.items():
                value = _outside(word, limit)
                inside = limit if word in ("minimum", "maximum") else None
                if value is not None:
                    mark = f"{operation.path} {name} {word}"
                    yield pytest.param(operation.path, name, value, inside, id=mark)


def _outside(word: str, limit: Any) -> Any:
    match word:
        case "minimum":
            return limit - 1
        case "maximum":
            return limit + 1
        case "exclusiveMinimum":
            return limit
        case "minLength":
            return "x" * (limit - 1)
        case "maxLength":
            return "x" * (limit + 1)
        case "maxProperties":
            return {str(n): "x" for n in range(limit + 1)}
        case "pattern":
            return "@"
        case "enum":
            return "other"
    return None  # of items: what they are differs


@pytest.mark.parametrize(("path", "name", "value", "inside"), list(beyond()))
async def test_limits_are_those_of_the_document(
    server: Server, path: str, name: str, value: Any, inside: Any
) -> None:
    body = {**BODIES[path], name: value}
    if name == "top_logprobs" and path == CHAT:
        body["logprobs"] = True
    if name == "chat_template_kwargs" and path == "/tokenize":
        body = {"messages": chat_body()["messages"], name: value}
    if name == "max_tokens" and path == "/v1/completions":
        body["echo"] = True
    response = await server.post(path, body)
    assert response.status == 400, await response.text()
    with pytest.raises(jsonschema.ValidationError):
        validate(body, _schema_of(path))
    if inside is not None:
        assert (await server.post(path, {**body, name: inside})).status == 200
