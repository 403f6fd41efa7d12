"""Streams outlive their frontend: whoever comes to another one with the id of the last event gets
the rest, and all of it is the answer that nobody disturbed."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from e2e.client import MODEL, eventually
from e2e.stack import PATIENCE_S, Stack, until
from slipstream.client.api import Api
from slipstream.client.stream import Meter

TOKENS = 200
KILLED_AFTER = 12
"""Events of each stream."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
CHAT = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat with logprobs": (
        "/v1/chat/completions",
        {
            **CHAT,
            "messages": [{"role": "user", "content": "Tell me a long story about a harbour."}],
            "temperature": 0,
            "max_tokens": TOKENS,
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    "two choices": (
        "/v1/completions",
        {
            **CHAT,
            "prompt": "The ship left the harbour at dawn, and",
            "n": 2,
            "seed": 11,
            "temperature": 0.9,
            "presence_penalty": 0.5,
            "max_tokens": TOKENS,
        },
    ),
    "held to a schema": (
        "/v1/chat/completions",
        {
            **CHAT,
            "messages": [{"role": "user", "content": "Describe a harbour, with many tags."}],
            "seed": 5,
            "temperature": 1,
            "min_tokens": 60,
            "max_tokens": TOKENS,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "harbour", "strict": True, "schema": SCHEMA},
            },
        },
    ),
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    # Without a watchdog, or a frontend that stands still would be killed before it can be fenced.
    running = Stack(frontend=2, tokenizer=2, disaggregation="auto", threads=1, watchdog_s=0)
    yield running
    running.close()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@dataclass(eq=False)
class Stream:
    """What has come, event by event, over all connections."""

    path: str
    body: dict[str, Any]
    ids: list[str] = field(default_factory=list)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    status: int = 0
    reading: asyncio.Task[None] | None = None
    """Of its first connection."""

    def begin(self, http: aiohttp.ClientSession, url: str) -> None:
        self.reading = asyncio.create_task(self.follow(http, url))

    async def broken_off(self) -> None:
        assert self.reading is not None
        await self.reading

    async def follow(self, http: aiohttp.ClientSession, url: str) -> None:
        """Until the connection ends, however it does."""
        headers = {"Accept": "text/event-stream"}
        if self.ids:
            headers["Last-Event-ID"] = self.ids[-1]
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        try:
            async with http.post(
                url + self.path, json=self.body, headers=headers, timeout=timeout
            ) as reply:
                self.status = reply.status
                if reply.status != 200:
                    self.errors.append(await reply.json())
                    return
                event: list[str] = []
                async for line in reply.content:
                    if line.strip():
                        event.append(line.decode().rstrip("\n"))
                    else:
                        self._take(event)
                        event = []
        except (aiohttp.ClientError, OSError):
            pass

    def _take(self, event: list[str]) -> None:
        fields = dict(line.split(": ", 1) for line in event if not line.startswith(":"))
        if fields.get("data") == "[DONE]":
            self.done = True
        elif "data" in fields:
            said = json.loads(fields["data"])
            if "error" in said:
                self.errors.append(said)
            else:
                self.ids.append(fields["id"])
                self.chunks.append(said)

    def answer(self) -> dict[int, Any]:
        """Of each choice: text, log probabilities, why it ended."""
        found: dict[int, Any] = {}
        for chunk in self.chunks:
            for choice in chunk["choices"]:
                of = found.setdefault(choice["index"], ["", [], ""])
                of[0] += choice.get("text") or choice.get("delta", {}).get("content") or ""
                of[1] += (choice.get("logprobs") or {}).get("content") or []
                of[2] = choice["finish_reason"] or of[2]
        return found

    def check(self, undisturbed: "Stream") -> None:
        assert self.done and not self.errors, self.errors
        assert self.answer() == undisturbed.answer()
        assert (
            self.chunks[-1]["usage"]["completion_tokens"]
            == (undisturbed.chunks[-1]["usage"]["completion_tokens"])
        )
        assert len(set(self.ids)) == len(self.ids)
        assert len({(c["id"], c["created"], c["model"]) for c in self.chunks}) == 1


def new(name: str) -> Stream:
    return Stream(*REQUESTS[name])


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> dict[str, Stream]:
    async def ask() -> dict[str, Stream]:
        streams = {name: new(name) for name in REQUESTS}
        async with aiohttp.ClientSession() as http:
            for stream in streams.values():
                await stream.follow(http, url(stack, 1))
                assert stream.done, stream.errors
        return streams

    return asyncio.run(ask())


def url(stack: Stack, frontend: int) -> str:
    return f"http://127.0.0.1:{stack.port + frontend}"


async def ready(stack: Stack) -> None:
    await asyncio.to_thread(until, stack.serves, "ready")


async def begun(stack: Stack, http: aiohttp.ClientSession) -> dict[str, Stream]:
    """All of them in the middle, at the first frontend."""
    await ready(stack)
    streams = {name: new(name) for name in REQUESTS}
    for stream in streams.values():
        stream.begin(http, stack.url)
    await eventually(lambda: all(len(s.ids) >= KILLED_AFTER for s in streams.values()))
    assert not any(stream.done for stream in streams.values())
    return streams


async def go_on(stack: Stack, http: aiohttp.ClientSession, streams: dict[str, Stream]) -> None:
    await asyncio.gather(*(stream.follow(http, url(stack, 1)) for stream in streams.values()))


@pytest.mark.parametrize("redis", ["redis", "no redis"])
async def test_a_killed_frontend_s_streams_go_on_at_another_one(
    stack: Stack, http: aiohttp.ClientSession, undisturbed: dict[str, Stream], redis: str
) -> None:
    streams = await begun(stack, http)
    pids = stack.pids()
    if redis == "no redis":
        os.kill(pids["redis"], signal.SIGSTOP)
    try:
        stack.kill_child("frontend-0")
        await asyncio.gather(*(stream.broken_off() for stream in streams.values()))
        assert not any(stream.done for stream in streams.values())
        await go_on(stack, http, streams)
    finally:
        os.kill(pids["redis"], signal.SIGCONT)
    for name, stream in streams.items():
        stream.check(undisturbed[name])
    await asyncio.to_thread(stack.until_whole)


async def test_a_frontend_that_stood_still_has_lost_its_streams(
    stack: Stack, http: aiohttp.ClientSession, undisturbed: dict[str, Stream]
) -> None:
    streams = await begun(stack, http)
    pid = stack.pids()["frontend-0"]
    os.kill(pid, signal.SIGSTOP)
    news = {name: Stream(s.path, s.body, s.ids[:], s.chunks[:]) for name, s in streams.items()}
    try:
        await go_on(stack, http, news)
    finally:
        os.kill(pid, signal.SIGCONT)
    for name, stream in news.items():
        stream.check(undisturbed[name])
    await asyncio.gather(*(stream.broken_off() for stream in streams.values()))
    for name, old in streams.items():
        assert old.errors[0]["error"]["code"] == "stream_taken", name
        assert set(old.ids) <= set(news[name].ids), "it told nothing of its own"
    await asyncio.to_thread(stack.until_whole)


async def test_an_answer_that_is_over_is_kept_for_a_while(
    stack: Stack, http: aiohttp.ClientSession, undisturbed: dict[str, Stream]
) -> None:
    await ready(stack)
    name = "two choices"
    whole = undisturbed[name]
    again = new(name)
    await again.follow(http, stack.url)
    cut = Stream(again.path, again.body, again.ids[:20], again.chunks[:20])
    await cut.follow(http, url(stack, 1))
    cut.check(whole)
    assert (cut.ids, cut.chunks) == (again.ids, again.chunks), "byte for byte"
    other = Stream(again.path, {**again.body, "temperature": 0.8}, again.ids[:20])
    await other.follow(http, url(stack, 1))
    assert other.status == 404 and other.errors[0]["error"]["code"] == "stream_not_found"


async def test_who_leaves_is_not_computed_for(stack: Stack, http: aiohttp.ClientSession) -> None:
    """Nor kept: the id of a stream whose client has hung up leads nowhere."""
    await ready(stack)
    stream = new("chat with logprobs")
    reading = asyncio.create_task(stream.follow(http, stack.url))
    await eventually(lambda: len(stream.ids) >= 3)
    reading.cancel()
    left_s = time.monotonic()
    await asyncio.to_thread(stack.until_settled)
    assert time.monotonic() - left_s < PATIENCE_S
    await stream.follow(http, url(stack, 1))
    assert stream.status == 404


async def test_our_own_client_goes_on_by_itself(
    stack: Stack, undisturbed: dict[str, Stream]
) -> None:
    """At the same address, where the frontend is started again."""
    await ready(stack)
    path, body = REQUESTS["chat with logprobs"]
    meter, text = Meter(0.0), ""
    async with Api(stack.url) as api:
        async for choices in api.stream(path, body, meter):
            if not text and meter.last_id:
                stack.kill_child("frontend-0")
            text += "".join(choice.content for choice in choices)
    assert text == undisturbed["chat with logprobs"].answer()[0][0]
    await asyncio.to_thread(stack.until_whole)
