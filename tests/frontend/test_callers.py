"""Requests with API keys: who is let in, how much, and that nobody sees anything of others."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import aiohttp
import anthropic
import msgspec
import openai
import pytest

from frontend.fakes import MODEL, FakeGateway, Pause, Server, answer, chat_body, serving, until
from frontend.test_trace_api import TRACE
from slipstream.frontend import app, callers, watched
from slipstream.frontend.api_keys import digest
from slipstream.frontend.app import AppSettings
from slipstream.frontend.playground_api import NAMES
from slipstream.frontend.validate import Limits
from slipstream.messages import NodeInfo, TraceFound
from slipstream.spans import TENANT
from slipstream.types import Role

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def entry(name: str, key: str, **members: object) -> str:
    said = {"name": name, "sha256": digest(key.encode()).hex(), **members}
    lines = [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in said.items()]
    return "\n".join(["[[key]]", *lines, ""])


FILE = (
    entry("alice", "key-a")
    + entry("alice", "key-a2")
    + entry("bob", "key-b")
    + entry("carl", "key-c", share_prefixes="team", weight=3, priority_min=-2)
    + entry("dora", "key-d", share_prefixes="team")
    + entry("team", "key-t")
    + entry("root", "key-r", operator=True)
    + entry("few", "key-few", requests_per_minute=2)
    + entry("brief", "key-brief", tokens_per_minute=8)
    + entry("single", "key-single", max_concurrent=1)
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "keys.toml"
    found.write_text(FILE)
    return found


@pytest.fixture
async def server(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(watched, "RELOAD_S", 0.02)
    monkeypatch.setattr(app, "Callers", partial(callers.Callers, clock=lambda: 1000.0))
    limits = Limits(max_body_bytes=100_000)
    settings = AppSettings(limits=limits, keep_alive_s=5.0, api_keys_file=str(path))
    async with serving(FakeGateway(), settings) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(server: Server, key: str, **members: object) -> aiohttp.ClientResponse:
    return await server.post(CHAT, chat_body(**members), **bearer(key))


async def get(server: Server, path: str, **headers: str) -> tuple[int, bytes]:
    async with server.client.get(server.url + path, headers=headers) as reply:
        return reply.status, await reply.read()


# --- Who is let in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        *({"Authorization": f"{word} key-a"} for word in ("Bearer", "bearer", "BEARER ")),
        {"x-api-key": "key-a2"},
        {"x-api-key": "key-a", "Authorization": "Bearer key-a"},
    ],
)
async def test_a_key_in_either_header(server: Server, headers: dict[str, str]) -> None:
    assert (await server.post(CHAT, chat_body(), **headers)).status == 200
    assert server.gateway.submissions[-1].tenant == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer nobodys")],
        [("Authorization", "Bearer " + digest(b"key-a").hex())],
        [("Authorization", "Basic key-a")],
        [("Authorization", "key-a")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer")],
        [("Authorization", "")],
        [("x-api-key", "")],
        [("Authorization", "Bearer kéy-a")],
        [("Authorization", "Bearer key-a"), ("Authorization", "Bearer key-a")],
        [("x-api-key", "key-a"), ("x-api-key", "key-a")],
        [("Authorization", "Bearer key-a"), ("x-api-key", "key-b")],
        [("Authorization", "Basic key-b"), ("x-api-key", "key-b")],
    ],
)
@pytest.mark.parametrize("where", [CHAT, "/v1/messages", "/v1/models?api_key=key-a", "/nowhere"])
async def test_without_one_nobody_is_let_in(
    server: Server, where: str, headers: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    method = "GET" if "?" in where else "POST"
    async with server.client.request(method, server.url + where, headers=headers) as reply:
        body = await reply.json()
    assert reply.status == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
    assert reply.headers["x-request-id"]
    kind, code = body["error"]["type"], body["error"].get("code")
    if where == "/v1/messages":
        assert kind == "authentication_error"
    else:
        assert (kind, code) == ("invalid_request_error", "invalid_api_key")
    assert not server.gateway.submissions
    assert "key-a" not in caplog.text and "key-b" not in body["error"]["message"]


async def test_what_is_not_even_http_is_refused_too(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\0-a\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()


async def test_probes_and_the_page_are_open_and_nothing_else_is(server: Server) -> None:
    for path in ("/livez", "/readyz", "/health", *(f"/playground/{name}" for name in NAMES)):
        assert (await get(server, path))[0] == 200, path
    assert (await get(server, "/", Accept="text/html"))[0] == 200
    closed = ["/", "/v1/models", "/version", "/openapi.json", "/trace/x", "/metrics", "/cluster"]
    for path in (*closed, "/livez/", "//livez", "/playground", "/v1/responses/resp_x"):
        assert (await get(server, path))[0] == 401, path
    async with server.client.post(server.url + "/livez") as reply:
        assert reply.status == 401
    async with server.client.options(server.url + CHAT) as reply:
        assert reply.status == 401


async def test_what_tells_of_all_is_for_operators(server: Server) -> None:
    for path in ("/metrics", "/cluster"):
        status, body = await get(server, path, **bearer("key-a"))
        assert status == 403 and b"permission_denied" in body
        assert (await get(server, path, **bearer("key-r")))[0] == 200


async def test_who_is_not_let_in_costs_no_more_than_that(server: Server) -> None:
    """Before the length of the body is looked at, which is before its words are."""
    long = b"x" * 100_001
    assert (await server.post(CHAT, long)).status == 401
    assert (await server.post(CHAT, long, **bearer("key-few"))).status == 413
    assert (await server.post(CHAT, b"x", **bearer("key-few"))).status == 400
    assert (await server.post(CHAT, b"x", **bearer("key-few"))).status == 400
    reply = await server.post(CHAT, b"x", **bearer("key-few"))
    assert reply.status == 429, "only what was too long cost nothing"


# --- The file changes -----------------------------------------------------------------------------


def say(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


async def until_let_in(server: Server, key: str) -> None:
    for _ in range(250):
        if (await get(server, "/v1/models", **bearer(key)))[0] == 200:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{key} is not taken")


async def test_keys_come_and_go_while_it_runs(server: Server, path: Path) -> None:
    gateway = server.gateway
    gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], Pause(0.4), *answer(s, ["a", "b"])[2:]]
    running = asyncio.create_task(ask(server, "key-b"))
    await until(lambda: len(gateway.streams) == 1)
    say(path, entry("alice", "key-a2") + entry("alice", "key-a3"))
    await until_let_in(server, "key-a3")
    assert (await get(server, "/v1/models", **bearer("key-a2")))[0] == 200, "both, for a while"
    assert (await get(server, "/v1/models", **bearer("key-a")))[0] == 401
    assert (await get(server, "/v1/models", **bearer("key-b")))[0] == 401
    assert (await running).status == 200, "who was let in stays"


async def test_a_file_that_says_nonsense_changes_nothing(
    server: Server, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say(path, "[[key")
    await until(lambda: "what the file said before holds on" in caplog.text)
    os.remove(path)
    await until(lambda: "No such file" in caplog.text)
    assert (await ask(server, "key-a")).status == 200
    say(path, entry("zoe", "key-z"))
    await until_let_in(server, "key-z")
    assert (await ask(server, "key-a")).status == 401


# --- Limits ---------------------------------------------------------------------------------------


async def test_requests_per_minute(server: Server) -> None:
    replies = [await ask(server, "key-few") for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    first, last = replies[0].headers, replies[-1].headers
    assert first["x-ratelimit-limit-requests"] == "2"
    assert [r.headers["x-ratelimit-remaining-requests"] for r in replies] == ["1", "0", "0"]
    assert first["x-ratelimit-reset-requests"] == "30s"
    assert "x-ratelimit-limit-tokens" not in first
    assert (last["Retry-After"], last["retry-after-ms"]) == ("30", "30000")
    error = (await replies[-1].json())["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "'few'" in error["message"] and "2 requests per minute" in error["message"]
    assert (await ask(server, "key-a")).status == 200, "nobody else is concerned"
    assert not [k for k in (await ask(server, "key-a")).headers if k.startswith("x-ratelimit")]


async def test_tokens_per_minute(server: Server) -> None:
    """Five of the prompt, however many choices; one for each piece of each answer."""
    reply = await ask(server, "key-brief", n=2, stream=True)
    assert reply.status == 200 and reply.headers["x-ratelimit-limit-tokens"] == "8"
    late = await ask(server, "key-brief")
    assert late.status == 429 and late.headers["x-ratelimit-remaining-tokens"] == "0"
    assert late.headers["Retry-After"] == "15", "two of eight in a minute"
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    refused = await server.post("/v1/messages", body, **{"x-api-key": "key-brief"})
    assert (await refused.json())["error"]["type"] == "rate_limit_error"


async def test_requests_at_a_time(server: Server) -> None:
    server.gateway.script = lambda s: [Pause(0.3), *answer(s, ["a"])]
    first = asyncio.create_task(ask(server, "key-single"))
    await until(lambda: len(server.gateway.streams) == 1)
    assert (await ask(server, "key-single")).status == 429
    assert (await first).status == 200
    async with server.client.post(
        server.url + CHAT, json=chat_body(stream=True), headers=bearer("key-single")
    ):
        pass  # leaves
    await until(lambda: server.gateway.streams[-1].closed > 0)
    assert (await ask(server, "key-single")).status == 200


async def test_frontends_share_a_limit(server: Server) -> None:
    others = [
        NodeInfo(node_id=f"frontend-{n}", role=Role.FRONTEND, epoch=1, address="f") for n in (0, 1)
    ]
    now = server.gateway.now
    server.gateway.now = msgspec.structs.replace(now, nodes=[*now.nodes, *others])
    assert [(await ask(server, "key-few")).status for _ in range(2)] == [200, 429]


async def test_what_each_key_has_had(server: Server) -> None:
    for key in ("key-a", "key-a2", "key-few", "key-few", "key-few"):
        await ask(server, key)
    text = (await get(server, "/metrics", **bearer("key-r")))[1].decode()
    for line in (
        'slipstream_key_requests_total{key="alice",model="demo"} 2.0',
        'slipstream_key_tokens_total{key="alice",model="demo"} 14.0',
        'slipstream_key_prompt_tokens_total{key="alice",model="demo"} 10.0',
        'slipstream_key_cached_tokens_total{key="alice",model="demo"} 4.0',
        'slipstream_key_completion_tokens_total{key="alice",model="demo"} 4.0',
        'slipstream_key_refused_total{key="few",model=""} 1.0',
        'slipstream_key_requests_total{key="bob",model=""} 0.0',
    ):
        assert line in text


# --- Apart from the others ------------------------------------------------------------------------


async def salts(server: Server, *asked: tuple[str, str | None]) -> list[str]:
    for key, salt in asked:
        reply = await ask(server, key, **({} if salt is None else {"cache_salt": salt}))
        assert reply.status == 200
    return [submission.salt for submission in server.gateway.submissions]


async def test_no_two_clients_share_a_prefix(server: Server) -> None:
    found = await salts(
        server,
        *(("key-a", None), ("key-a", "x"), ("key-a", "bob"), ("key-b", None), ("key-b", "x")),
        *(("key-c", None), ("key-t", None), ("key-t", "team"), ("key-c", "x")),
    )
    assert len(set(found)) == len(found)


async def test_keys_of_a_name_and_members_of_a_group_share_them(server: Server) -> None:
    found = await salts(
        server, *((key, "x") for key in ("key-a", "key-a2", "key-c", "key-d", "key-t"))
    )
    assert found[0] == found[1] and found[2] == found[3] and len(set(found)) == 3


async def test_without_keys_everybody_has_the_salt_that_they_say() -> None:
    async with serving(FakeGateway(), AppSettings()) as server:
        await ask(server, "whatever", cache_salt="x")
        (submission,) = server.gateway.submissions
    assert (submission.salt, submission.tenant, submission.weight) == ("x", "", 1)


async def test_the_scheduler_is_told_for_whom(server: Server) -> None:
    await ask(server, "key-c", priority=-2)
    (submission,) = server.gateway.submissions
    assert (submission.tenant, submission.weight, submission.priority) == ("carl", 3, -2)
    reply = await ask(server, "key-c", priority=-3)
    assert reply.status == 400 and "priority must be at least -2" in await reply.text()
    assert (await ask(server, "key-a", priority=-1)).status == 400
    assert (await ask(server, "key-a", priority=9)).status == 200


async def test_a_response_is_its_makers(server: Server) -> None:
    body = {"model": MODEL, "input": "Hi"}
    made = (await (await server.post(RESPONSES, body, **bearer("key-a"))).json())["id"]
    one, items = f"{RESPONSES}/{made}", f"{RESPONSES}/{made}/input_items"
    for path in (one, items):
        assert (await get(server, path, **bearer("key-b")))[0] == 404
        assert (await get(server, path, **bearer("key-r")))[0] == 404
        assert (await get(server, path, **bearer("key-a2")))[0] == 200
    unknown = await get(server, f"{RESPONSES}/resp_nowhere", **bearer("key-b"))
    others = await get(server, one, **bearer("key-b"))
    assert others[1].replace(made.encode(), b"resp_nowhere") == unknown[1], "not even that it is"
    on = {**body, "previous_response_id": made}
    refused = await server.post(RESPONSES, on, **bearer("key-b"))
    assert refused.status == 404 and "previous_response_not_found" in await refused.text()
    referring = {**body, "input": [{"type": "item_reference", "id": f"msg_{made[5:]}_0"}]}
    assert (await server.post(RESPONSES, referring, **bearer("key-b"))).status == 404
    async with server.client.delete(server.url + one, headers=bearer("key-b")) as reply:
        assert reply.status == 404
    assert (await server.post(f"{one}/cancel", b"", **bearer("key-b"))).status == 404
    assert (await server.post(RESPONSES, on, **bearer("key-a2"))).status == 200
    async with server.client.delete(server.url + one, headers=bearer("key-a2")) as reply:
        assert reply.status == 200


async def test_a_trace_is_its_makers_and_the_operators(server: Server) -> None:
    *rest, front = TRACE.processes
    (root,) = front.spans
    known = msgspec.structs.replace(root, attributes={TENANT: "alice"})
    front = msgspec.structs.replace(front, spans=[known])
    of_alice = msgspec.structs.replace(TRACE, processes=[*rest, front])
    of_nobody = msgspec.structs.replace(TRACE, processes=rest)
    server.gateway.found = TraceFound(call_id="c", traces=[of_alice, of_nobody], kept=9)
    for key, count in (("key-a", 1), ("key-a2", 1), ("key-r", 2)):
        status, body = await get(server, "/trace/x", **bearer(key))
        assert status == 200 and len(msgspec.json.decode(body)["traces"]) == count
    assert (await get(server, "/trace/x", **bearer("key-b")))[0] == 404


# --- Clients as they are --------------------------------------------------------------------------


async def test_openais_client(server: Server) -> None:
    async with AsyncExitStack() as stack:
        ours, theirs = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)
            )
            for key in ("key-few", "nobodys")
        ]
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
        reply = await ours.chat.completions.with_raw_response.create(**asked)
        assert reply.headers["x-ratelimit-remaining-requests"] == "1"
        stream = await ours.chat.completions.create(**asked, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        assert text == "Hello world"
        with pytest.raises(openai.RateLimitError) as limited:
            await ours.chat.completions.create(**asked)
        assert limited.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.AuthenticationError) as refused:
            await theirs.chat.completions.create(**asked)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):
            await ours.get("../cluster", cast_to=object)


async def test_anthropics_client(server: Server) -> None:
    asked = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    for shown in ({"api_key": "key-a"}, {"auth_token": "key-a"}):
        async with anthropic.AsyncAnthropic(base_url=server.url, max_retries=0, **shown) as made:
            reply = await made.messages.create(**asked)
            assert reply.content[0].text == "Hello world"
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="no", max_retries=0) as made:
        with pytest.raises(anthropic.AuthenticationError):
            await made.messages.create(**asked)
