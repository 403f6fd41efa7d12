"""The client: what it makes of streams, however they are cut, and of servers that misbehave."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.fake_server import CONTEXT, MODEL, FakeServer
from slipstream.client.api import Api, ApiError
from slipstream.client.prompts import TOKEN_IDS, token_prompt, word_prompt
from slipstream.client.stream import AnswerError, Meter

CHAT = (
    b': comment\n\ndata: {"id":"c1","model":"m","choices":[{"delta":{"role":"assistant",'
    b'"content":""}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"a \xc3\xa4"}}]}\r\n\r\n'
    b'data:{"choices":[{"delta":{"content":"b"}}]}\n\n'
    b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    b"data: [DONE]\n\n"
)


@given(st.sets(st.integers(1, len(CHAT) - 1), max_size=12))
def test_a_stream_is_the_same_however_it_is_cut(cuts: set[int]) -> None:
    meter, text = Meter(0.0), ""
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(CHAT)], strict=True):
        text += "".join(choice.content for choice in meter.feed(CHAT[begin:end], 1.0))
    assert text == "a äb"
    assert (meter.id, meter.model, meter.finish_reason, meter.done) == ("c1", "m", "length", True)
    assert meter.usage is not None
    assert (meter.tokens, meter.usage.prompt_tokens, meter.usage.cached_tokens) == (3, 9, 4)


@pytest.mark.parametrize("line", [b": ping", b":", b"event: message", b"retry: 100", b"id: 7"])
@pytest.mark.parametrize("end", [b"\r\n", b" \n"])
def test_lines_without_data_are_passed_over(line: bytes, end: bytes) -> None:
    """As other servers and proxies write them."""
    meter = Meter(0.0)
    found = meter.feed(line + end + b'data: {"choices":[{"text":"a"}]} ' + end + end, 1.0)
    assert [choice.content for choice in found] == ["a"]


def test_times_are_of_chunks_with_tokens() -> None:
    """Neither the chunk that opens a chat nor the one that ends it is a token."""
    meter = Meter(10.0, keep_gaps=True)
    for number, line in enumerate(CHAT.splitlines(keepends=True), 11):
        meter.feed(line, float(number))
    first_s, last_s = 5.0, 7.0
    assert (meter.first_s, meter.last_s, meter.gaps_s) == (first_s, last_s, [last_s - first_s])
    assert meter.tpot_s == (last_s - first_s) / 2


def test_a_completion_s_token_may_have_no_text_yet() -> None:
    meter = Meter(0.0)
    meter.feed(b'data: {"choices":[{"text":""}]}\n\n', 2.0)
    assert meter.first_s == 2.0


async def test_a_server_that_is_not_there_is_said_in_one_line() -> None:
    async with Api("http://127.0.0.1:9") as api:
        with pytest.raises(
            ApiError, match=r"^http://127\.0\.0\.1:9: Connection refused$"
        ) as caught:
            await api.model()
    assert caught.value.status == 0


async def test_models_by_name(fake: FakeServer) -> None:
    async with Api(fake.url, "hunter2") as api:
        card = await api.model()
        assert (card.id, card.max_model_len) == (MODEL, CONTEXT)
        assert await api.model(MODEL) == card
        with pytest.raises(ApiError, match=f"has no model other; there: {MODEL}$"):
            await api.model("other")
    assert set(fake.keys) == {"Bearer hunter2"}


async def test_something_else_than_json_is_shown_in_short(fake: FakeServer) -> None:
    async with Api(fake.url) as api:
        with pytest.raises(ApiError, match="/metrics answers something else: # TYPE"):
            await api.ask("/metrics", dict)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("refused", "^HTTP 500: out of order$"),
        ("overflow", f"^HTTP 400: .*{CONTEXT} tokens"),
        ("error", "^an error in the stream: .*lost it"),
        ("unfinished", "^the answer was cut off before its end$"),
        ("cut", "^the answer was cut off before its end$"),
    ],
)
async def test_a_bad_answer_is_none(fake: FakeServer, fault: str, told: str) -> None:
    fake.fault = fault
    async with Api(fake.url) as api:
        with pytest.raises(AnswerError, match=told):
            async for _ in api.stream("/v1/completions", {}, Meter(time.perf_counter())):
                pass


async def test_a_refusal_says_when_to_come_again(fake: FakeServer) -> None:
    fake.refusals = 1
    async with Api(fake.url) as api:
        with pytest.raises(ApiError) as caught:
            async for _ in api.stream("/v1/completions", {}, Meter(0.0)):
                pass
    error = caught.value
    assert (error.status, error.code, error.retry_after_s) == (429, "queue_full", 1.0)


def test_prompts_are_the_seed_s() -> None:
    assert token_prompt("a", 50) == token_prompt("a", 50) != token_prompt("b", 50)
    assert len(token_prompt("a", 50)) == 50 and set(token_prompt("a", 50)) <= set(TOKEN_IDS)
    assert len(word_prompt("a", 50).split()) == 50
