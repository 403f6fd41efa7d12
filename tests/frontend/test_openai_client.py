"""The client that most people use, unchanged."""

from collections.abc import AsyncIterator

import openai
import pytest

from frontend.fakes import MODEL, Pause, Server, answer, until
from slipstream.errors import ErrorCode, Problem

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=0
    ) as made:
        yield made


async def test_chat(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model=MODEL, messages=HI, n=2, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in reply.choices] == ["Hello world"] * 2
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].token == "alt0"
    assert reply.usage.prompt_tokens_details.cached_tokens == 2
    assert reply._request_id


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello world"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 7
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello world"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in reply.choices] == ["Hello world"] * 2
    assert reply.choices[0].logprobs.text_offset == [0, 5]
    stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello world"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "slipstream"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


async def test_errors(server: Server, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"at most 2, but is 3\.0") as caught:
        await client.chat.completions.create(model=MODEL, messages=HI, temperature=3)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    server.gateway.refuse(Problem(code=ErrorCode.QUEUE_FULL, message="Full.", retry_after_s=0.01))
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model=MODEL, messages=HI)


async def test_an_error_in_mid_stream(server: Server, client: openai.AsyncOpenAI) -> None:
    problem = Problem(code=ErrorCode.DEADLINE, message="Too late.")
    server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], problem]
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="Too late") as caught:
        [chunk async for chunk in stream]
    assert caught.value.code == "deadline_exceeded"


async def test_it_tries_again_when_told_to(server: Server, client: openai.AsyncOpenAI) -> None:
    seen = 0

    def script(submission: object) -> list[object]:
        nonlocal seen
        seen += 1
        if seen == 1:
            return [Problem(code=ErrorCode.QUEUE_FULL, message="Full.", retry_after_s=0.05)]
        return list(answer(server.gateway.submissions[-1], ["ok"]))

    server.gateway.script = script
    reply = await client.with_options(max_retries=1).chat.completions.create(
        model=MODEL, messages=HI
    )
    assert reply.choices[0].message.content == "ok" and seen == 2


async def test_closing_a_stream_aborts_it(server: Server, client: openai.AsyncOpenAI) -> None:
    server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], Pause(60)]
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content == "a":
            break
    await stream.close()
    await until(lambda: server.gateway.streams[0].closed == 1)
