"""GET /trace/{name}."""

import asyncio

import pytest

from frontend.fakes import Server
from frontend.test_machine_http import Client, client  # noqa: F401 (a fixture)
from slipstream.frontend import service
from slipstream.messages import TraceFound
from slipstream.spans import ProcessSpans, Span, Trace, TraceContext
from slipstream.types import Role

MS = 1_000_000
AT = 1_800_000_000_000_000_000
TRACE = Trace(
    request_id="chatcmpl-x-0",
    context=TraceContext(trace_id="a" * 32, parent_id="b" * 16),
    decision={"policy": "cost"},
    processes=[
        ProcessSpans(
            node_id="decode-0",
            role=Role.DECODE,
            epoch=2,
            spans=[Span(number=1, name="decode", begin_ns=AT + 5 * MS, attributes={"attempt": 1})],
        ),
        ProcessSpans(
            node_id="frontend-0",
            role=Role.FRONTEND,
            epoch=1,
            spans=[Span(number=4, name="request", begin_ns=AT, end_ns=AT + 20 * MS)],
        ),
    ],
)


async def test_a_trace(server: Server) -> None:
    server.gateway.found = TraceFound(call_id="c", traces=[TRACE], kept=9)
    async with server.client.get(f"{server.url}/trace/x%2F%3Cy") as reply:
        assert reply.status == 200 and reply.headers["Cache-Control"] == "no-store"
        body = await reply.json()
    assert server.gateway.traces_asked == ["x/<y"]
    assert body["kept"] == 9
    (trace,) = body["traces"]
    spans = trace.pop("spans")
    assert trace == {
        "request_id": "chatcmpl-x-0",
        "trace_id": "a" * 32,
        "parent_id": "b" * 16,
        "decision": {"policy": "cost"},
    }
    assert [(s["node_id"], s["name"], s["begin_ms"], s["duration_ms"]) for s in spans] == [
        ("frontend-0", "request", 0.0, 20.0),
        ("decode-0", "decode", 5.0, None),
    ]
    assert spans[1]["attributes"] == {"attempt": 1} and spans[1]["begin_unix_ns"] == str(
        AT + 5 * MS
    )


async def test_a_name_that_nobody_knows(server: Server) -> None:
    async with server.client.get(f"{server.url}/trace/nobody") as reply:
        assert reply.status == 404
        error = (await reply.json())["error"]
    assert error["code"] == "trace_not_found" and "last 3 requests" in error["message"]
    async with server.client.get(f"{server.url}/trace/{'x' * 200}") as reply:
        assert reply.status == 404
    assert server.gateway.traces_asked == ["nobody"]


async def test_a_scheduler_that_is_silent(server: Server) -> None:
    server.gateway.found = None
    async with server.client.get(f"{server.url}/trace/x") as reply:
        assert reply.status == 503 and "scheduler" in await reply.text()


async def test_the_service_waits_for_so_long_and_no_longer(
    client: Client,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "TRACE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(service, "TRACES_ASKED_MAX", 2)
    asked = [client.stack.service.trace("x") for _ in range(3)]
    assert await asyncio.gather(*asked) == [None] * 3
    async with client.get("/trace/x") as reply:
        assert reply.status == 503
