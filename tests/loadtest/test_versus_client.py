"""The client of the comparison: what it counts, and that no bad answer is counted."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest import fake_openai as fake
from slipstream.loadtest.versus.client import Answer, Client, Meter, model_name, new_session
from slipstream.loadtest.versus.errors import AnswerError
from slipstream.loadtest.versus.loads import Load, PrefixLoad, prompt, run, warm_up


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    async with TestServer(fake.application()) as server, new_session() as session:
        url = str(server.make_url("")).rstrip("/")
        yield Client(session, url, await model_name(session, url))


def chunks(tokens_each: list[int]) -> list[bytes]:
    """A stream as it is written, one item for each chunk of tokens, and the end."""
    said = [b'data: {"choices":[{"text":"x"}]}\n\n' for _ in tokens_each]
    usage = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
    return [*said, usage % sum(tokens_each)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 40))
def test_time_per_token_whatever_is_in_a_chunk(tokens_each: list[int], piece: int) -> None:
    """A chunk comes each second: tokens after the first share the time from the first to the last,
    wherever the network cuts the bytes."""
    meter = Meter(begin_s=100.0)
    for second, chunk in enumerate(chunks(tokens_each), start=1):
        for place in range(0, len(chunk), piece):
            meter.feed(chunk[place : place + piece], 100.0 + second)
    tokens = sum(tokens_each)
    answer = meter.answer(tokens)
    assert (answer.first_s, answer.last_s, answer.tokens) == (1.0, len(tokens_each), tokens)
    assert answer.tpot_s == pytest.approx((len(tokens_each) - 1) / max(1, tokens - 1))
    with pytest.raises(AnswerError, match=f"{tokens} tokens instead of {tokens + 1}"):
        meter.answer(tokens + 1)


async def test_an_answer(client: Client) -> None:
    answer = await client.complete([9, 9], 7)
    assert answer.tokens == 7
    assert 0 < answer.first_s < answer.last_s


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (fake.REFUSED, "HTTP 500: .*out of order"),
        (fake.BROKEN_OFF, "Error"),
        (fake.SAYS_ERROR, "an error in the stream: .*lost it"),
        (fake.TOO_SHORT, "6 tokens instead of 7"),
        (fake.NONSENSE, "cannot be read: {nonsense"),
    ],
)
async def test_a_bad_answer_is_none(client: Client, fault: int, told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        await client.complete([fault], 7)


async def test_a_closed_loop(client: Client) -> None:
    load = Load(prompt_tokens=5, output_tokens=8, concurrency=3, requests=7)
    await warm_up(load, client, "a")
    numbers = await run(load, client, "a")
    assert numbers["requests"] == 7
    assert 0 < numbers["ttft_ms"] < numbers["ttft_p99_ms"]
    assert numbers["output_tok_s"] > 0 and numbers["tpot_ms"] > 0


async def test_one_bad_answer_spoils_its_measurement(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad_third(seed: str, tokens: int, period: int) -> list[int]:
        return [fake.TOO_SHORT if seed.endswith(" 2") else 9] * tokens

    monkeypatch.setattr("slipstream.loadtest.versus.loads.prompt", bad_third)
    with pytest.raises(AnswerError, match="1 of 5 answers: 7 tokens instead of 8"):
        await run(Load(5, 8, 2, 5), client, "a")


async def test_prefixes_are_shared_and_new() -> None:
    """The first answer to each prefix is slow here, later ones are not."""
    asked: list[list[int]] = []

    class Recorder(Client):
        def __init__(self) -> None:
            pass

        async def complete(self, prompt: list[int], max_tokens: int) -> Answer:
            known = any(prompt[:1000] == other[:1000] for other in asked)
            asked.append(prompt)
            return Answer(0.1 if known else 1.0, 2.0, max_tokens, 0.1)

    numbers = await run(PrefixLoad(prefixes=3, repeats=2), Recorder(), "a")
    assert numbers == {"first_ttft_ms": 1000, "later_ttft_ms": 100, "later_of_first": 0.1}
    assert {len(tokens) for tokens in asked} == {1024}
    assert len({tuple(tokens) for tokens in asked}) == 9
    assert len({tuple(tokens[:1000]) for tokens in asked}) == 3


def test_prompts_are_the_seeds() -> None:
    assert prompt("a", 50) == prompt("a", 50) != prompt("b", 50)
