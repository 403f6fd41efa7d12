"""What API keys use at two frontends is one account: it is what the answers say, it outlives a
frontend that is killed and a Redis that is flushed, and quotas of a month are of it."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from redis import Redis

from e2e.client import MODEL, eventually
from e2e.stack import Stack, ports_in_a_row, until
from e2e.test_resume import Stream
from slipstream.frontend.api_keys import ApiKey, add

KEYS = {
    "alice": ApiKey(name="alice", sha256="0" * 64),
    "few": ApiKey(name="few", sha256="0" * 64, requests_per_month=3),
    "reader": ApiKey(name="reader", sha256="0" * 64),
    "root": ApiKey(name="root", sha256="0" * 64, operator=True),
}
PROMPT = "The ferryman counts his passengers on"


class Frontends(Stack):
    def __init__(self, folder: Path) -> None:
        path, self.audit_log = folder / "keys.toml", folder / "audit.jsonl"
        self.keys = {name: add(path, entry) for name, entry in KEYS.items()}
        first = ports_in_a_row(2)
        self.urls = [f"http://127.0.0.1:{first + number}" for number in range(2)]
        super().__init__(
            *(True, 2.0),
            **{"port": first, "frontend": 2, "threads": 1, "disaggregation": "auto"},
            **{"api_keys_file": path, "audit_log": self.audit_log},
        )

    def ask(self, frontend: int, key: str, **extra: Any) -> openai.types.CompletionUsage:
        client = openai.OpenAI(
            base_url=f"{self.urls[frontend]}/v1", api_key=self.keys[key], max_retries=0
        )
        reply = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, **extra
        )
        assert reply.usage is not None
        return reply.usage

    def usage(self, frontend: int, key: str, query: str = "") -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        url = f"{self.urls[frontend]}/v1/usage{query}"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as r:
            found: dict[str, Any] = json.load(r)
        return found

    def used(self, frontend: int, key: str) -> dict[str, int]:
        """Of this month, of the model."""
        results = self.usage(frontend, key)["data"][0]["month"]["results"]
        return next((one for one in results if one["model"] == MODEL), {})

    def answers(self, frontend: int) -> bool:
        try:
            return urllib.request.urlopen(f"{self.urls[frontend]}/readyz", timeout=5).status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frontends]:
    running = Frontends(tmp_path_factory.mktemp("usage"))
    yield running
    running.close()


def wanted(told: list[openai.types.CompletionUsage]) -> dict[str, int]:
    details = [one.prompt_tokens_details for one in told]
    return {
        "num_model_requests": len(told),
        "input_tokens": sum(one.prompt_tokens for one in told),
        "input_cached_tokens": sum((one and one.cached_tokens) or 0 for one in details),
        "output_tokens": sum(one.completion_tokens for one in told),
    }


def test_one_account_outlives_frontends_and_flushes(stack: Frontends) -> None:
    told = [stack.ask(number % 2, "alice", n=1 + number % 3) for number in range(6)]

    def same(frontend: int) -> bool:
        used = stack.used(frontend, "alice")
        return all(used.get(name) == amount for name, amount in wanted(told).items())

    for frontend in (0, 1):
        until(lambda: same(frontend), f"frontend-{frontend} knows all")  # noqa: B023
    time.sleep(2.5)  # what was counted last is said by then
    stack.kill_child("frontend-0")
    assert same(1), "the sum holds"
    until(lambda: stack.answers(0), "it is back")
    until(lambda: same(0), "and knows what it had counted itself")
    told += [stack.ask(0, "alice"), stack.ask(1, "alice")]
    for frontend in (0, 1):
        until(lambda: same(frontend), "both lives count")  # noqa: B023
    with Redis(unix_socket_path=str(stack.run_dir / "redis.sock")) as redis:
        lives = redis.hkeys("slu:{alice}:" + stack.usage(0, "alice")["data"][0]["month"]["period"])
        assert len(lives) == 3, "of one of the frontends two"
        redis.flushall()
        assert same(0) and same(1), "they remember what they were told"

        def said_again() -> bool:
            return len(list(redis.scan_iter("slu:{alice}:????-??"))) == 1

        until(said_again, "what living frontends have counted is said again")
    everybody = stack.usage(0, "root")
    assert everybody["complete"] and [one["key"] for one in everybody["data"]] == sorted(KEYS)


def test_a_quota_of_a_month_is_of_both(stack: Frontends) -> None:
    until(lambda: stack.answers(0) and stack.answers(1), "both")
    told = [stack.ask(number % 2, "few") for number in range(3)]
    for frontend in (0, 1):
        until(
            lambda: stack.used(frontend, "few").get("num_model_requests") == len(told),  # noqa: B023
            "it is known",
        )
        with pytest.raises(openai.RateLimitError) as refused:
            stack.ask(frontend, "few")
        assert refused.value.code == "insufficient_quota"
        assert refused.value.response.headers["x-ratelimit-remaining-requests-month"] == "0"


async def test_a_stream_that_goes_on_counts_its_prompt_once(stack: Frontends) -> None:
    body = {
        "model": MODEL, "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    await asyncio.to_thread(until, lambda: stack.answers(0) and stack.answers(1), "both")
    stream = Stream("/v1/completions", body)
    headers = {"Authorization": f"Bearer {stack.keys['reader']}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        stream.begin(http, stack.urls[0])
        await eventually(lambda: len(stream.ids) > 5)

        def heard() -> bool:
            return bool(stack.used(1, "reader").get("output_tokens"))

        await asyncio.to_thread(until, heard, "the other frontend has heard of it")
        assert not stream.done
        stack.kill_child("frontend-0")
        await stream.broken_off()
        await stream.follow(http, stack.urls[1])
    assert stream.done and not stream.errors
    whole = stream.chunks[-1]["usage"]
    used = await asyncio.to_thread(stack.used, 1, "reader")
    assert (used["num_model_requests"], used["input_tokens"]) == (1, whole["prompt_tokens"])
    assert 0 < used["output_tokens"] <= whole["completion_tokens"] == 400
    await asyncio.to_thread(until, lambda: stack.answers(0), "it is back")


def test_every_request_has_its_line(stack: Frontends) -> None:
    """Of two frontends, one of which was killed twice, in one file."""
    lines = [json.loads(line) for line in stack.audit_log.read_text().splitlines()]
    asked = [line for line in lines if line["act"] == "request"]
    alice = [line for line in asked if line["key"] == "alice"]
    assert len(alice) == 8 and {line["node"] for line in alice} == {"frontend-0", "frontend-1"}
    assert all(line["status"] == 200 and line["completion_tokens"] >= 5 for line in alice)
    ways = {way for line in alice for way in line["workers"].split(", ")}
    assert ways <= {"prefill-0", "decode-0", "prefill-0>decode-0", "decode-0>prefill-0"}
    few = [(line["status"], line.get("error")) for line in asked if line["key"] == "few"]
    assert few == [(200, None)] * 3 + [(429, "insufficient_quota")] * 2
    (reader,) = [line for line in asked if line["key"] == "reader"]
    assert reader["goes_on"] and "prompt_tokens" not in reader, "what was killed wrote nothing"
    text = stack.audit_log.read_text()
    assert PROMPT not in text and not any(key in text for key in stack.keys.values())
    starts = [line["node"] for line in lines if line["act"] == "started"]
    assert sorted(starts) == ["frontend-0"] * 3 + ["frontend-1"]
