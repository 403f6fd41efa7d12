"""What the client of chaos notes of answers, refusals and breaks."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from slipstream.loadtest.chaos.asks import COMPLETIONS, Ask, draw, stopped
from slipstream.loadtest.chaos.client import Client
from slipstream.loadtest.chaos.history import Choice, Entry

STREAMED = Ask("sea", COMPLETIONS, {"stream": True, "timeout": 5.0})
WHOLE = Ask("sea", COMPLETIONS, {"timeout": 5.0})
ERROR = {"error": {"code": "not_ready", "message": "not yet"}}


class Frontend:
    """Refuses so often, then streams, and breaks off after so many events."""

    def __init__(self) -> None:
        self.refusals, self.events = 0, 99
        self.bodies: list[dict[str, Any]] = []

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        if self.refusals:
            self.refusals -= 1
            return web.json_response(ERROR, status=503)
        if not self.bodies[-1].get("stream"):
            choice = {"index": 0, "text": "blue", "finish_reason": "stop"}
            return web.json_response({"id": "a", "choices": [choice], "usage": usage(3)})
        reply = web.StreamResponse(headers={"x-slipstream-path": "prefill-0>decode-1"})
        await reply.prepare(request)
        pieces = [
            {"index": 0, "text": "bl", "finish_reason": None, "logprobs": {"token_logprobs": [-1]}},
            {"index": 1, "text": "green", "finish_reason": "stop"},
            {"index": 0, "text": "ue", "finish_reason": "length"},
        ]
        events = [json.dumps({"id": "a", "choices": [piece]}) for piece in pieces]
        events += [json.dumps({"id": "a", "choices": [], "usage": usage(3)}), "[DONE]"]
        for event in events[: self.events]:
            await reply.write(f"data: {event}\n\n".encode())
        if self.events < len(events) and request.transport is not None:
            request.transport.close()
        return reply


def usage(completion: int) -> dict[str, int]:
    return {"prompt_tokens": 2, "completion_tokens": completion}


@pytest.fixture
def frontend() -> Frontend:
    return Frontend()


@pytest_asyncio.fixture
async def client(frontend: Frontend) -> AsyncIterator[Client]:
    """Its second frontend is not there."""
    app = web.Application()
    app.router.add_post(COMPLETIONS, frontend.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    client = Client([f"http://127.0.0.1:{runner.addresses[0][1]}", "http://127.0.0.1:1"])
    yield client
    await client.close()
    await runner.cleanup()


async def asked(client: Client, ask: Ask) -> Entry:
    entry, task = client.send(ask)
    await task
    return entry


async def test_a_stream_of_two_choices(client: Client) -> None:
    entry = await asked(client, STREAMED)
    assert entry.choices == {0: Choice("blue", "length", [-1.0]), 1: Choice("green", "stop")}
    assert (entry.done, entry.failed, len(entry.times_s)) == (True, False, 3)
    assert (entry.prompt_tokens, entry.completion_tokens) == (2, 3)
    assert (entry.answer_id, entry.decode) == ("a", "decode-1")


async def test_who_is_refused_asks_the_others(client: Client, frontend: Frontend) -> None:
    frontend.refusals = 2
    entry = await asked(client, WHOLE)
    assert entry.choices == {0: Choice("blue", "stop")}
    assert (entry.refused, entry.failed) == (4, False)  # two by nobody, two by the one


async def test_what_has_begun_is_not_asked_again(client: Client, frontend: Frontend) -> None:
    frontend.events = 1
    entry = await asked(client, STREAMED)
    assert entry.choices[0].text == "bl"
    assert entry.broken and entry.failed and not entry.refused
    assert len(frontend.bodies) == 1


async def test_a_client_may_leave(client: Client, frontend: Frontend) -> None:
    frontend.refusals = 1000
    entry, task = client.send(WHOLE)
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert entry.left and not entry.failed
    assert entry.end_s > entry.sent_s


def test_the_mix_is_the_seed_s() -> None:
    assert draw(3, "model") == draw(3, "model")
    assert draw(3, "model") != draw(4, "model")
    asks = {ask.name: ask for ask in draw(3, "model")}
    assert all(ask.body["model"] == "model" and ask.body["timeout"] for ask in asks.values())
    assert stopped(asks["stop string"], "0123456789").body["stop"] == ["6789"]
