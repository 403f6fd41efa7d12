"""A client whose frontend is gone goes on at another one, byte for byte."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import pytest

from frontend.fakes import (
    MODEL,
    FakeGateway,
    Pause,
    Server,
    answer,
    call,
    chat_body,
    parted,
    serving,
    speak,
    think,
    until,
)
from frontend.journals import MemoryStore
from slipstream.errors import Problem
from slipstream.frontend import journal
from slipstream.frontend.app import AppSettings, Books
from slipstream.frontend.event_ids import NAMED_CHOICES_MAX, created_unix_s, new_id
from slipstream.frontend.gateway import StreamItem
from slipstream.frontend.journal import Journal
from slipstream.messages import TextDelta, Tokenize
from slipstream.types import unpack_tokens

TEXTS = ["Hel", "lo", " wor", "ld", "!"]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
PATHS = {
    "/v1/chat/completions": chat_body(**STREAMED, logprobs=True, top_logprobs=1),
    "/v1/completions": {"model": MODEL, "prompt": "Hi", "n": 2, "echo": True, **STREAMED},
    "/v1/responses": {"model": MODEL, "input": "Hi", "stream": True},
    "/v1/messages": {
        "model": MODEL,
        "max_tokens": 9,
        "stream": True,
        "messages": [{"role": "user", "content": "Hi"}],
    },
}


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Server, Server, MemoryStore]]:
    """Two frontends and the store between them."""
    store, settings = MemoryStore(), AppSettings(keep_alive_s=5.0)
    first, second = Journal(store, 60.0), Journal(store, 60.0)
    async with (
        serving(FakeGateway(), settings, Books(first)) as one,
        serving(FakeGateway(), settings, Books(second)) as other,
    ):
        yield one, other, store


READS = {"Accept": "text/event-stream"}


def blocks(text: str) -> list[str]:
    return [block + "\n\n" for block in text.split("\n\n")[:-1]]


def id_of(block: str) -> str:
    found = re.match(r"id: (\S+)\n", block)
    return found[1] if found else ""


async def text_of(server: Server, path: str, body: object, last: str = "") -> str:
    headers = READS | ({"Last-Event-ID": last} if last else {})
    response = await server.post(path, body, **headers)
    assert response.status == 200, await response.text()
    return await response.text()


def mixed(submission: Tokenize) -> list[StreamItem]:
    """Two of the steps make several events each."""
    calls = call("look", '{"at":1}')
    if not submission.parse:
        return answer(submission, TEXTS)
    return parted(submission, [think("Hm")], [think("."), speak("I "), *calls], [], calls)


@pytest.mark.parametrize("path", PATHS)
async def test_whatever_was_lost_of_the_end_comes_again_as_it_was(
    pair: tuple[Server, Server, MemoryStore], path: str
) -> None:
    one, other, _ = pair
    one.gateway.script = mixed
    told = blocks(await text_of(one, path, PATHS[path]))
    named = [block for block in told if id_of(block)]
    assert len(named) > 4
    assert len({id_of(block) for block in named}) == len(named)
    for number, block in enumerate(named, 1):
        rest = await text_of(other, path, PATHS[path], id_of(block))
        assert rest == "".join(told[number:])
    assert not other.gateway.submissions, "all of it was in the journal"


class Reader:
    """Reads a stream for as long as the test likes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response, self.text = response, ""
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for data in self.response.content.iter_any():
            self.text += data.decode()

    async def until(self, condition: Callable[[str], bool]) -> None:
        await until(lambda: condition(self.text))

    async def end(self) -> str:
        await self._reading
        return self.text


async def begin(server: Server, path: str, body: object) -> Reader:
    return Reader(await server.client.post(server.url + path, json=body, headers=READS))


def rest_of(items: Sequence[StreamItem], accepted: bytes) -> list[StreamItem]:
    """As a tokenizer says it to who has these tokens."""
    have = len(unpack_tokens(accepted))
    return [x for x in items if isinstance(x, TextDelta) and x.position >= have]


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_goes_on_elsewhere_and_its_first_frontend_is_fenced(
    pair: tuple[Server, Server, MemoryStore], path: str
) -> None:
    one, other, _ = pair

    def stalling(submission: Tokenize) -> list[StreamItem | Pause]:
        items = mixed(submission)
        return [*items[:3], Pause(0.4), *items[3:]]

    def remaining(submission: Tokenize) -> list[StreamItem]:
        taken = other.gateway.taken[-1]
        assert taken is not None and taken.journaled and taken.prompt_tokens_told
        assert taken.owner >= 1 and len(taken.accepted) == 2 * 4
        return rest_of(mixed(submission), taken.accepted)

    one.gateway.script, other.gateway.script = stalling, remaining
    reader = await begin(one, path, PATHS[path])
    await until(lambda: len(one.gateway.submissions) > 0)
    await asyncio.sleep(0.15)
    first = blocks(reader.text)
    rest = await text_of(other, path, PATHS[path], id_of(first[-1]))
    zombie = await reader.end()
    assert "stream_taken" in zombie or "Another frontend" in zombie
    assert blocks(zombie)[: len(first)] == first

    call_id = id_of(first[0]).partition(":")[0]
    one.gateway.script = stalling
    whole = await text_of(one, path, PATHS[path])
    other_id = id_of(whole).partition(":")[0]
    core = slice(-32, None)
    same = whole.replace(other_id[core], call_id[core])
    made = re.compile(r'(call_[0-9a-f]{24}|toolu_\w+|"created(_at)?":\d+|"completed_at":\d+)')
    told = "".join(first) + rest
    assert made.sub("", told) == made.sub("", same)
    seeds = [s.sampling.seed for s in other.gateway.submissions]
    assert seeds == [s.sampling.seed for s in one.gateway.submissions[: len(seeds)]]


async def test_without_the_journal_the_tokenizer_is_asked(
    pair: tuple[Server, Server, MemoryStore],
) -> None:
    one, other, store = pair
    body = chat_body(stream=True)
    told = blocks(await text_of(one, "/v1/chat/completions", body))
    store.down = True
    rest = await text_of(other, "/v1/chat/completions", body, id_of(told[1]))
    assert rest == "".join(told[2:])
    assert [t and (t.journaled, t.accepted) for t in other.gateway.taken] == [(False, b"")]


async def test_another_request_does_not_get_a_stream(
    pair: tuple[Server, Server, MemoryStore],
) -> None:
    one, other, _ = pair
    told = blocks(await text_of(one, "/v1/chat/completions", chat_body(stream=True)))
    last = id_of(told[1])
    await text_of(other, "/v1/chat/completions", chat_body(stream=True, temperature=0.5), last)
    (taken,) = other.gateway.taken
    assert taken is not None and not taken.journaled, "it must show that it is the same"
    await text_of(other, "/v1/chat/completions", chat_body(stream=True), last)
    assert len(other.gateway.taken) == 1, "and the other one's try has not harmed it"


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("7", "must be the id"),
        (f"chatcmpl-{'a' * 32}:1", "must be the id"),
        (f"chatcmpl-{'a' * 32}:1.1,2.1", "another request"),
        (f"cmpl-{'a' * 32}:1.1", "another request"),
        (f"chatcmpl-{'a' * 32}:{'9' * 600}.1", "must be the id"),
    ],
)
async def test_what_is_no_id_of_the_stream_is_refused(
    pair: tuple[Server, Server, MemoryStore], last: str, said: str
) -> None:
    body = chat_body(stream=True)
    response = await pair[0].post("/v1/chat/completions", body, **{"Last-Event-ID": last})
    error: dict[str, Any] = (await response.json())["error"]
    assert response.status == 400 and said in error["message"]
    assert error["param"] == "Last-Event-ID"


async def test_only_streams_go_on(pair: tuple[Server, Server, MemoryStore]) -> None:
    last = {"Last-Event-ID": f"chatcmpl-{new_id()}:1.1"}
    response = await pair[0].post("/v1/chat/completions", chat_body(), **last)
    assert response.status == 400


async def test_who_leaves_takes_the_journal_along(
    pair: tuple[Server, Server, MemoryStore],
) -> None:
    one, _, store = pair
    one.gateway.script = lambda s: [*answer(s, TEXTS)[:3], Pause(30.0)]
    reader = await begin(one, "/v1/completions", {"model": MODEL, "prompt": "x", "stream": True})
    await reader.until(lambda text: "Hel" in text)
    assert store.streams
    reader.response.close()
    await until(lambda: not store.streams)


@pytest.mark.parametrize("how", ["down", "slow"])
async def test_a_store_that_fails_holds_up_nobody(
    pair: tuple[Server, Server, MemoryStore], how: str
) -> None:
    one, _, store = pair
    store.down, store.delay_s = how == "down", 0.0 if how == "down" else 30.0
    one.gateway.script = lambda s: answer(s, TEXTS)
    async with asyncio.timeout(5):
        told = await text_of(one, "/v1/completions", PATHS["/v1/completions"])
    assert told.endswith("data: [DONE]\n\n") and told.count("Hel") == 2
    writes = store.writes
    await text_of(one, "/v1/completions", PATHS["/v1/completions"])
    assert store.writes == writes, "it is left alone for a while"


async def test_streams_with_many_choices_have_no_ids(
    pair: tuple[Server, Server, MemoryStore],
) -> None:
    one, _, store = pair
    body = {"model": MODEL, "prompt": ["x"] * (NAMED_CHOICES_MAX + 1), "stream": True}
    assert "id: " not in await text_of(one, "/v1/completions", body)
    assert not store.streams


async def test_a_journal_is_bounded(
    pair: tuple[Server, Server, MemoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, store = pair
    monkeypatch.setattr(journal, "CALL_BYTES_MAX", 200)
    one.gateway.script = lambda s: [x for i in answer(s, TEXTS) for x in (i, Pause(0.02))]
    body = {"model": MODEL, "prompt": "x", "stream": True}
    told = blocks(await text_of(one, "/v1/completions", body))
    assert len(told) == len(TEXTS) + 1
    ((_, entries),) = store.streams.values()
    assert len(entries) < len(TEXTS)
    # Behind its end the tokenizer's word counts, and what the client has is not said again.
    other.gateway.script = lambda s: rest_of(
        answer(s, TEXTS), (other.gateway.taken[-1] or pytest.fail()).accepted
    )
    rest = await text_of(other, "/v1/completions", body, id_of(told[3]))
    assert rest == "".join(told[4:])
    monkeypatch.setattr(journal, "BYTES_MAX", 1)
    writes = store.writes
    await text_of(one, "/v1/completions", body)
    assert store.writes == writes


def test_ids_say_when_they_were_made() -> None:
    assert abs(created_unix_s(f"cmpl-name-{new_id()}") - created_unix_s(new_id())) <= 1


async def test_a_refusal_is_not_journaled(pair: tuple[Server, Server, MemoryStore]) -> None:
    one, _, store = pair
    one.gateway.refuse(Problem(code=journal.TAKEN.code, message="no"))
    response = await one.post("/v1/completions", {"model": MODEL, "prompt": "x", "stream": True})
    assert response.status == 409 and not store.streams


async def lines_for(server: Server, accept: str) -> list[str]:
    headers = {"Accept": accept}
    response = await server.post("/v1/chat/completions", chat_body(stream=True), **headers)
    return blocks(await response.text())


async def test_ids_stand_where_a_client_can_read_them(
    pair: tuple[Server, Server, MemoryStore],
) -> None:
    one, other, _ = pair
    for accept in ("*/*", "text/html, */*;q=0.1"):  # as curl, aiohttp, httpx and fetch say
        told = await lines_for(one, accept)
        ids, data = told[::2][:-1], told[1::2]
        assert len(data) == len(ids) and told[-1] == "data: [DONE]\n\n"
        assert all(json.loads(block.strip().removeprefix("data: ")) for block in data)
        assert all(re.fullmatch(r":\nid: \S+\n\n", block) for block in ids)
        last = ids[1].split()[-1]
        rest = await text_of(other, "/v1/chat/completions", chat_body(stream=True), last)
        assert [block.partition("\n")[2] for block in blocks(rest)[:-1]] == data[2:]
    told = await lines_for(one, "application/json")  # as OpenAI's clients
    assert not [block for block in told if "id: " in block.partition("data: ")[0]]
    assert "id:" not in "".join(block.partition("{")[0] for block in told)
