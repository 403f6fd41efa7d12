"""GET /v1/usage, and what counts: by key and model, once however often a stream goes on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from frontend.fakes import MODEL, FakeGateway, Pause, Server, answer, chat_body, serving, until
from frontend.journals import MemoryStore
from frontend.test_callers import CHAT, ask, bearer, entry, get
from frontend.test_openapi import check
from frontend.test_resume import READS, blocks, id_of
from frontend.usages import Accounts, MemoryUsage
from slipstream.frontend import app, callers, usage_sync
from slipstream.frontend.app import AppSettings, Books
from slipstream.frontend.journal import Journal

FILE = (
    entry("alice", "key-a")
    + entry("bob", "key-b", requests_per_month=2)
    + entry("carl", "key-c", tokens_per_month=20, tokens_per_minute=600)
    + entry("root", "key-r", operator=True)
)
ANSWER = {"num_model_requests": 1, "input_tokens": 5, "input_cached_tokens": 2, "output_tokens": 2}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "keys.toml"
    found.write_text(FILE)
    return found


@asynccontextmanager
async def frontend(
    accounts: Accounts, path: Path | str, name: str, journal: Journal | None = None
) -> AsyncIterator[Server]:
    settings = AppSettings(keep_alive_s=5.0, api_keys_file=str(path))
    usage = MemoryUsage(accounts, name)
    async with serving(FakeGateway(), settings, Books(journal, usage)) as running:
        yield running


@pytest.fixture
async def pair(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Server, Server]]:
    monkeypatch.setattr(app, "Callers", partial(callers.Callers, clock=lambda: 1000.0))
    monkeypatch.setattr(usage_sync, "EXCHANGE_S", 0.02)
    accounts = Accounts()
    async with frontend(accounts, path, "f-0.1") as one, frontend(accounts, path, "f-1.1") as two:
        yield one, two


async def usage(server: Server, key: str = "", query: str = "") -> dict[str, Any]:
    url = f"{server.url}/v1/usage{query}"
    async with server.client.get(url, headers=bearer(key) if key else {}) as reply:
        assert reply.headers["Cache-Control"] == "no-store"
        await check(reply, "/v1/usage")
        found: dict[str, Any] = await reply.json()
    return found


async def of_month(server: Server, key: str = "") -> dict[str | None, dict[str, int]]:
    """Of the only client that it tells of: model -> what is not zero."""
    (one,) = (await usage(server, key))["data"]
    assert one["minute"]["results"] == one["month"]["results"]
    return {
        result["model"]: {name: n for name, n in result.items() if isinstance(n, int) and n}
        for result in one["month"]["results"]
    }


async def test_what_a_key_has_used_everywhere(pair: tuple[Server, Server]) -> None:
    one, two = pair
    for server in (one, two, two):
        assert (await ask(server, "key-a")).status == 200
    await one.post(CHAT, b"{", **bearer("key-a"))
    twice = {name: 3 * amount for name, amount in ANSWER.items()}
    expected = {MODEL: twice, None: {"num_model_requests": 1}}
    await asyncio.sleep(0.1)
    assert await of_month(one, "key-a") == expected == await of_month(two, "key-a")
    (told,) = (await usage(one, "key-a"))["data"]
    assert told["key"] == "alice" and told["limits"] == [] and told["past_months"] == []
    month = told["month"]
    assert month["period"] == "2026-11" and month["end_time"] - month["start_time"] == 30 * 86_400
    assert await of_month(two, "key-b") == {}


async def test_choices_share_a_prompt_and_streams_count_alike(pair: tuple[Server, Server]) -> None:
    one, _ = pair
    replies = [await ask(one, "key-a", n=2, stream=stream) for stream in (False, True)]
    told = (await replies[0].json())["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (5, 4)
    whole = {"num_model_requests": 2, "input_tokens": 10, "input_cached_tokens": 4}
    assert await of_month(one, "key-a") == {MODEL: {**whole, "output_tokens": 8}}


async def test_a_client_that_leaves_has_used_what_was_made(pair: tuple[Server, Server]) -> None:
    one, _ = pair
    one.gateway.script = lambda s: [*answer(s, ["a", "b", "c"])[:3], Pause(30.0)]
    headers = {**bearer("key-a"), **READS}
    async with one.client.post(one.url + CHAT, json=chat_body(stream=True), headers=headers) as r:
        await r.content.readuntil(b'"b"')
    await until(lambda: one.gateway.streams[0].closed > 0)
    counted = {"num_model_requests": 1, "input_tokens": 5, "output_tokens": 2}
    assert await of_month(one, "key-a") == {MODEL: counted}


async def test_the_month_s_quota_is_one_for_all_frontends(pair: tuple[Server, Server]) -> None:
    one, two = pair
    first = await ask(one, "key-b")
    assert first.headers["x-ratelimit-limit-requests-month"] == "2"
    assert first.headers["x-ratelimit-remaining-requests-month"] == "1"
    await ask(two, "key-b")
    await asyncio.sleep(0.1)
    refused = await ask(one, "key-b")
    assert refused.status == 429 and refused.headers["Retry-After"] == "60"
    assert refused.headers["x-should-retry"] == "false"
    error = (await refused.json())["error"]
    assert error["type"] == error["code"] == "insufficient_quota"
    assert (
        "2 requests of this month" in error["message"] and "2026-12-01T00:00Z" in error["message"]
    )
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    other = await two.post("/v1/messages", body, **{"x-api-key": "key-b"})
    assert other.status == 429 and (await other.json())["error"]["type"] == "rate_limit_error"
    async with openai.AsyncOpenAI(base_url=f"{one.url}/v1", api_key="key-b") as client:
        with pytest.raises(openai.RateLimitError) as limited:
            await client.chat.completions.create(**chat_body())  # type: ignore[call-overload]
    assert limited.value.code == "insufficient_quota"
    await asyncio.sleep(0.1)
    (told,) = (await usage(two, "key-b"))["data"]
    (result, nameless) = told["month"]["results"][::-1]
    assert result["num_model_requests"] == 2 and nameless["num_refused_requests"] == 3, (
        "OpenAI's client was told not to try again"
    )
    (limit,) = told["limits"]
    assert (limit["name"], limit["limit"], limit["remaining"]) == ("requests-month", 2, 0)
    assert limit["reset_after_s"] == told["month"]["end_time"] - 1_795_000_000


async def test_tokens_of_a_month(pair: tuple[Server, Server]) -> None:
    one, two = pair
    statuses = []
    for server in (one, two, one, two):
        statuses.append((await ask(server, "key-c")).status)
        await asyncio.sleep(0.1)
    assert statuses == [200, 200, 200, 429], "what runs is not cut off: 21 of 20"
    (told,) = (await usage(one, "key-c"))["data"]
    assert {limit["name"]: limit["remaining"] for limit in told["limits"]} == {
        "tokens": 579,
        "tokens-month": 0,
    }


async def test_whom_it_tells_of(pair: tuple[Server, Server]) -> None:
    one, _ = pair
    await ask(one, "key-a")
    assert [told["key"] for told in (await usage(one, "key-b"))["data"]] == ["bob"]
    assert [told["key"] for told in (await usage(one, "key-b", "?key=bob"))["data"]] == ["bob"]
    everybody = (await usage(one, "key-r"))["data"]
    assert [told["key"] for told in everybody] == ["alice", "bob", "carl", "root"]
    (alice,) = (await usage(one, "key-r", "?key=alice"))["data"]
    assert alice == everybody[0] and alice["month"]["results"]
    for key, query, status in (
        *(("key-b", "?key=alice", 403), ("key-b", "?key=nobody", 403)),
        *(("key-r", "?key=nobody", 400), ("", "", 401)),
    ):
        assert (await get(one, f"/v1/usage{query}", **bearer(key)))[0] == status
    assert (await get(one, "/v1/usage?key=%00%ff", **bearer("key-r")))[0] == 400


async def test_without_keys_everybody_is_one() -> None:
    async with serving(FakeGateway(), AppSettings()) as server:
        for key in ("x", "y"):
            await ask(server, key)
        told = await usage(server)
        assert not told["complete"], "there is no Redis"
        assert [one["key"] for one in told["data"]] == [""]
        assert await of_month(server) == {MODEL: {name: 2 * n for name, n in ANSWER.items()}}


async def test_a_store_that_is_away_is_no_failure(path: Path) -> None:
    accounts = Accounts()
    store = MemoryUsage(accounts, "f-0.1")
    settings = AppSettings(api_keys_file=str(path))
    async with serving(FakeGateway(), settings, Books(usage=store)) as server:
        assert (await usage(server, "key-a"))["complete"]
        store.down = True
        assert (await ask(server, "key-a")).status == 200
        told = await usage(server, "key-a")
        assert not told["complete"] and told["data"][0]["month"]["results"]


# --- Streams that go on elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("journaled", [True, False])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_that_goes_on_elsewhere_counts_once(journaled: bool, n: int) -> None:
    """The first frontend has said all of it; its client has half."""
    accounts, store = Accounts(), MemoryStore()
    body = chat_body(stream=True, n=n)
    async with (
        frontend(accounts, "", "f-0.1", Journal(store, 60.0)) as one,
        frontend(accounts, "", "f-1.1", Journal(store, 60.0)) as two,
    ):
        whole = await one.post(CHAT, body, **READS)
        named = [block for block in blocks(await whole.text()) if id_of(block)]
        store.down = not journaled
        last = id_of(named[len(named) // 2])
        rest = await two.post(CHAT, body, **READS, **{"Last-Event-ID": last})
        assert rest.status == 200 and "[DONE]" in await rest.text()
        for server in (one, two):
            await usage(server)
        counted = (await of_month(two))[MODEL]
    assert counted["num_model_requests"] == 1 and counted["input_tokens"] == 5
    if journaled:
        assert counted["output_tokens"] == 2 * n
    else:  # what the first one has made and the client has not seen is made anew
        seen = sum(int(part.split(".")[0]) for part in last.rpartition(":")[2].split(","))
        assert counted["output_tokens"] == 2 * n + (2 * n - seen)
