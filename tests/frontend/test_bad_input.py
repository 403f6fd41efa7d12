"""The catalogue of bad input: what is refused, with which code and name; and nothing breaks."""

import asyncio
import json
import time
from typing import Any

import pytest

from frontend.catalogue import ACCEPTED, CHAT, REFUSED, chat
from frontend.fakes import Server, answer

LEAKS = ("Traceback", "/tmp", "/usr", "site-packages", "0x7")


async def check_error(server: Server, response: Any, code: str, param: str | None) -> None:
    body = await response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert body["error"]["message"].isprintable() and len(body["error"]["message"]) < 600
    assert response.headers["x-request-id"]
    assert response.headers["Content-Type"].startswith("application/json")
    text = await response.text()
    assert not any(leak in text for leak in LEAKS)
    assert server.gateway.streams == [] and server.gateway.codec_calls == []


@pytest.mark.parametrize("name", REFUSED)
async def test_refused(server: Server, name: str) -> None:
    (path, body), status, code, param = REFUSED[name]
    begin = time.perf_counter()
    response = await server.post(path, body)
    elapsed_s = time.perf_counter() - begin
    assert response.status == status, await response.text()
    await check_error(server, response, code, param)
    assert elapsed_s < 1.0  # 0.2 s on a machine of our own
    assert (await server.chat()).status == 200


@pytest.mark.parametrize("name", ACCEPTED)
async def test_accepted(server: Server, name: str) -> None:
    response = await server.post(*ACCEPTED[name])
    assert response.status == 200, await response.text()


async def test_content_type_and_encoding(server: Server) -> None:
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Encoding": "gzip"},
    ):
        response = await server.post(*chat(), **headers)
        assert response.status == 415
        await check_error(server, response, "unsupported_media_type", None)
    typed = await server.post(*chat(), **{"Content-Type": "application/json; charset=utf-8"})
    assert typed.status == 200


async def test_a_long_body_without_a_length(server: Server) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 10_000

    response = await server.client.post(
        server.url + CHAT, data=endless(), headers={"Content-Type": "application/json"}
    )
    assert response.status == 413
    await check_error(server, response, "request_too_large", None)


async def test_methods(server: Server) -> None:
    for method, path, allowed in (
        ("GET", CHAT, "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
    ):
        response = await server.client.request(method, server.url + path)
        assert (response.status, response.headers["Allow"]) == (405, allowed)
        await check_error(server, response, "method_not_allowed", None)
    response = await server.client.get(server.url + "/v1/models/unknown")
    assert response.status == 404
    await check_error(server, response, "model_not_found", "model")


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id.1_A", True), ("a b", False), ("x" * 65, False), ("é", False)]
)
async def test_request_ids(server: Server, given: str, kept: bool) -> None:
    for path, body in (chat(), ("/nowhere", {})):
        response = await server.post(path, body, **{"X-Request-Id": given})
        assert (response.headers["x-request-id"] == given) is kept
    twice = [await server.post(*chat(), **{"X-Request-Id": "same"}) for _ in range(2)]
    first, second = [(await response.json())["id"] for response in twice]
    assert first != second and first.startswith("chatcmpl-same-")
    assert len({s.request_id for s in server.gateway.submissions}) == 3


@pytest.mark.parametrize("value", ["x", "-5", "0", "1e3", "9" * 12])
async def test_a_timeout_header_that_is_none(server: Server, value: str) -> None:
    response = await server.post(*chat(), **{"X-Request-Timeout-Ms": value})
    assert response.status == 400
    code = "decimal_below_min_value" if value == "0" else "invalid_value"
    await check_error(server, response, code, "X-Request-Timeout-Ms")


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    ],
)
async def test_what_is_no_http_is_told_so_in_our_shape(server: Server, request_: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request_)
    async with asyncio.timeout(5):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 400 ") or head.startswith(b"HTTP/1.0 400 ")
    assert b"x-request-id: " in head.lower()
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and error["message"].isprintable()
    assert (await server.chat()).status == 200


async def test_a_body_that_never_comes_disturbs_nobody(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 500\r\n\r\n{"
    )
    assert (await server.chat()).status == 200
    writer.close()
    assert (await server.chat()).status == 200
    assert len(server.gateway.streams) == 2 and reader is not None


async def test_a_bug_of_ours_shows_nothing_of_itself(server: Server) -> None:
    server.gateway.broken = True
    response = await server.chat()
    assert response.status == 500 and response.headers["x-should-retry"] == "true"
    await check_error(server, response, "internal_error", None)
    server.gateway.broken = False
    server.gateway.script = lambda submission: answer(submission, ["ok"])
    assert (await server.chat()).status == 200
