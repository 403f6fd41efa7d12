"""What a schema costs: rounds by turns, answers of one length, and the page."""

import json
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from slipstream.client.stream import AnswerError
from slipstream.loadtest import structured
from slipstream.loadtest.structured import SCHEMA, STREAMS, Found, Rates, keep, of_server, rounds_of


def _event(chunk: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


class Fake:
    """A server that needs no time, and says `short` tokens less than were asked for."""

    def __init__(self, short: int = 0) -> None:
        self.held: list[bool] = []
        self._short = short

    def application(self) -> web.Application:
        app = web.Application()
        chat = web.post("/v1/chat/completions", self._answer)
        app.add_routes([chat, web.get("/v1/models", self._models)])
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        asked = body.get("response_format")
        assert asked is None or asked["json_schema"]["schema"] == SCHEMA
        assert body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
        self.held.append(asked is not None)
        tokens = body["max_tokens"] - self._short
        text = _event({"choices": [{"index": 0, "delta": {"content": "a"}}]}) * tokens
        usage = _event({"choices": [], "usage": {"completion_tokens": tokens}})
        return web.Response(body=text + usage + b"data: [DONE]\n\n")


async def test_rounds_of_a_server_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured.Meter, "tpot_s", 0.01)  # the fake's own is next to nothing
    fake = Fake()
    async with TestServer(fake.application()) as server:
        found = await of_server(str(server.make_url("")).rstrip("/"), 2, 5)
    turns = [set(fake.held[i : i + STREAMS]) for i in range(0, len(fake.held), STREAMS)]
    assert turns == [{False}, {True}, {True}, {False}, {False}, {True}], "the first to warm up"
    assert (found.tokens, found.free, found.held) == (5, (800.0, 800.0), (800.0, 800.0))


async def test_an_answer_of_another_length_counts_for_nothing() -> None:
    async with TestServer(Fake(short=1).application()) as server:
        with pytest.raises(AnswerError, match="4 tokens, asked for 5"):
            await of_server(str(server.make_url("")).rstrip("/"), 1, 5)


async def found_of(*rates: tuple[float, float]) -> Found:
    coming = iter([(1.0, 1.0), *rates])

    async def measure(number: int) -> Rates:
        return Rates(*next(coming))

    return await rounds_of(len(rates), 7, measure)


async def test_the_page_keeps_what_was_found_elsewhere(tmp_path: Path) -> None:
    keep(tmp_path / "page", "server", await found_of((100.0, 80.0)))
    keep(tmp_path / "page", "engine", await found_of((100.0, 97.0), (50.0, 45.0), (100.0, 95.0)))
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    engine, server = (
        line for line in text.splitlines() if line.startswith("| eng") or "80" in line
    )
    assert engine == "| engine | 7 | 100, 50, 100 | 97, 45, 95 | 0.950 (0.900 to 0.970) | met |"
    assert server == "| server | 7 | 100 | 80 | 0.800 (0.800 to 0.800) | not met |"
    assert json.loads((tmp_path / "page.json").read_bytes()).keys() == {"engine", "server"}
