"""The stream as bytes, and what ends it early."""

import asyncio
import contextlib
import json
import re
from typing import Any

import msgspec
import pytest

from frontend.fakes import FakeGateway, Pause, Server, answer, chat_body, serving, until
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.app import AppSettings
from slipstream.frontend.callers import Callers
from slipstream.frontend.generation import TAKEN_MAX, Answers, Call
from slipstream.frontend.trail import Trail
from slipstream.frontend.validate import Limits
from slipstream.messages import TextDelta, TextPrompt, Tokenize
from slipstream.spans import TraceContext
from slipstream.types import SamplingParams, pack_tokens

PROBLEM = Problem(code=ErrorCode.MIGRATIONS, message="Three workers failed.")


def a_submission() -> Tokenize:
    sampling = SamplingParams(max_tokens=9, seed=1)
    return Tokenize(request_id="r", prompt=TextPrompt(text="Hi"), sampling=sampling, timeout_s=9.0)


def events(text: str) -> list[Any]:
    """The objects of a stream; checks that the framing is exact."""
    assert text.endswith("data: [DONE]\n\n")
    blocks = text.removesuffix("data: [DONE]\n\n").split("\n\n")
    assert blocks.pop() == ""
    blocks = [block for block in blocks if block != ": keep-alive"]
    found = [re.fullmatch(r"(?:id: (\S+)\n)?data: (\{.*\})", block) for block in blocks]
    assert all(found)
    chunks = [json.loads(one[2]) for one in found if one]
    ids = [one[1] for one in found if one and "error" not in one[2]]
    assert all(ids) and len(set(ids)) == len(ids)
    return chunks


async def test_a_chat_stream_byte_by_byte(server: Server) -> None:
    response = await server.chat(stream=True)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    text = await response.text()
    first = json.loads(text.split("\n\n")[0].partition("data: ")[2])
    assert int(first["id"].removeprefix("chatcmpl-")[:8], 16) == first["created"]
    head = (
        f'data: {{"id":"{first["id"]}","object":"chat.completion.chunk",'
        f'"created":{first["created"]},"model":"demo","system_fingerprint":"slipstream","choices":['
    )
    name = f"id: {first['id']}"
    assert text == (
        f'{name}:1.1\n{head}{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,'
        '"finish_reason":null}]}\n\n'
        f'{name}:1.2\n{head}{{"index":0,"delta":{{"content":"Hello"}},"logprobs":null,'
        '"finish_reason":null}]}\n\n'
        f'{name}:2.1\n{head}{{"index":0,"delta":{{"content":" world"}},"logprobs":null,'
        '"finish_reason":"stop","stop_reason":"END"}]}\n\n'
        "data: [DONE]\n\n"
    )


async def test_a_completion_stream(server: Server) -> None:
    chunks = events(await (await server.complete(stream=True)).text())
    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": None},
        {
            "index": 0,
            "text": " world",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": "END",
        },
    ]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_usage_comes_last_and_only_on_demand(server: Server, path: str) -> None:
    ask = getattr(server, path)
    assert "usage" not in await (await ask(stream=True)).text()
    asked = await ask(stream=True, stream_options={"include_usage": True})
    chunks = events(await asked.text())
    assert [("usage" in chunk, bool(chunk["choices"])) for chunk in chunks[-2:]] == [
        (False, True),
        (True, False),
    ]
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_continuous_usage_counts_tokens(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await (await server.chat(stream=True, stream_options=options)).text())
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 2]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {5}


async def writes(
    server: Server, monkeypatch: pytest.MonkeyPatch, script: list[Any], **members: object
) -> list[int]:
    """Events in each write of the server to its client."""
    written: list[bytes] = []
    write = asyncio.selector_events._SelectorSocketTransport.write

    def spy(transport: asyncio.Transport, data: bytes) -> None:
        written.append(bytes(data))
        write(transport, data)

    server.gateway.script = lambda submission: script
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.selector_events._SelectorSocketTransport, "write", spy)
        text = await (await server.chat(stream=True, **members)).text()
    assert b"".join(written).count(b"data: ") == text.count("data: ")
    return [data.count(b"data: ") for data in written if not data.startswith(b"POST")]


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
async def test_what_has_arrived_goes_out_in_one_write(
    server: Server, monkeypatch: pytest.MonkeyPatch, pause_s: float
) -> None:
    """With the headers before it; `[DONE]` with the body's end behind it."""
    prompt, *deltas = answer(a_submission(), ["a", "b", "c"])
    items = [prompt, deltas[0], Pause(pause_s), *deltas[1:]]
    found = await writes(server, monkeypatch, items if pause_s else [prompt, *deltas])
    assert found == ([2, 2, 1] if pause_s else [4, 1]), "the role comes with the first text"


async def test_one_write_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    found = await writes(server, monkeypatch, answer(a_submission(), ["x"] * 200))
    assert sum(found) == 200 + 2 and max(found) <= TAKEN_MAX + 1


def with_silent_token(submission: Tokenize) -> list[Any]:
    items = answer(submission, ["a", "", "b"])
    return items


async def test_deltas_without_text_are_swallowed_unless_they_carry_something(
    server: Server,
) -> None:
    server.gateway.script = with_silent_token
    chunks = events(await (await server.chat(stream=True)).text())
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "a", "b"]
    chunks = events(await (await server.chat(stream=True, logprobs=True)).text())
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "a", "", "b"]
    server.gateway.script = lambda s: answer(s, ["a", ""])
    chunks = events(await (await server.chat(stream=True)).text())
    assert chunks[-1]["choices"][0]["delta"] == {}


async def test_several_choices_in_one_stream(server: Server) -> None:
    def script(submission: Tokenize) -> list[Any]:
        name = str(submission.sampling.choice)
        items = answer(submission, [name, name])
        return [Pause(0.01 * (3 - submission.sampling.choice)), *items]

    server.gateway.script = script
    options = {"include_usage": True}
    chunks = events(await (await server.chat(stream=True, n=3, stream_options=options)).text())
    *chunks, last = chunks
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == str(index) * 2
        assert [c["finish_reason"] for c in mine] == [None, None, "stop"]
    assert last["usage"]["prompt_tokens"] == 5 and last["usage"]["completion_tokens"] == 6
    assert all(stream.closed for stream in server.gateway.streams)


async def test_a_problem_before_the_first_token_is_a_status(server: Server) -> None:
    server.gateway.script = lambda submission: [5, PROBLEM]
    response = await server.chat(stream=True)
    assert response.status == 500
    assert response.headers["Content-Type"].startswith("application/json")
    assert (await response.json())["error"]["code"] == "too_many_migrations"
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_a_problem_in_mid_stream_is_an_event(server: Server, path: str) -> None:
    server.gateway.script = lambda submission: [*answer(submission, ["a", "b"])[:2], PROBLEM]
    chunks = events(await (await getattr(server, path)(stream=True)).text())
    assert chunks[-1] == {
        "error": {
            "message": "Three workers failed.",
            "type": "server_error",
            "param": None,
            "code": "too_many_migrations",
        }
    }
    assert server.gateway.streams[0].closed


async def test_silence_after_the_first_token_ends_the_answer() -> None:
    settings = AppSettings(limits=Limits(stall_timeout_s=0.6), keep_alive_s=0.1)
    async with serving(FakeGateway(), settings) as server:

        def script(submission: Tokenize) -> list[Any]:
            items = answer(submission, list("abcdef"))
            return [items[0], *(thing for item in items[1:] for thing in (item, Pause(0.2)))]

        server.gateway.script = script
        assert (await server.chat()).status == 200, "between two tokens, and not in all"
        server.gateway.script = lambda s: [Pause(0.9), *answer(s, ["a"])]
        assert (await server.chat()).status == 200, "before the first one others watch"
        server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], Pause(60.0)]
        chunks = events(await (await server.chat(stream=True)).text())
        assert chunks[-1]["error"]["code"] == "stream_stalled"
        assert "No token came for 0.6 s" in chunks[-1]["error"]["message"]
        response = await server.chat(n=2)
        assert response.status == 504 and response.headers["x-should-retry"] == "true"
        assert all(stream.closed for stream in server.gateway.streams)


async def test_a_slow_reader_is_not_taken_for_a_silent_worker() -> None:
    gateway = FakeGateway()
    asked = msgspec.structs.replace(a_submission(), request_id="r-0")
    call = Call(
        id="r", created=0, model="m", system_fingerprint="f", submissions=[asked],
        trail=Trail(Callers().nobody, 0.0),
        stall_timeout_s=0.05, n=1, stream=True, include_usage=False, continuous_usage=False,
        wants_logprobs=False, context=TraceContext(trace_id="a" * 32),
    )  # fmt: skip
    with Answers(gateway, call) as answers:
        await answers.open()
        await asyncio.sleep(0.3)
        while await answers.more():
            assert [delta.text for _, delta in answers.take()] == ["Hello", " world"]


async def test_time_that_is_used_up_is_not_asked_for_again(server: Server) -> None:
    server.gateway.refuse(Problem(code=ErrorCode.DEADLINE, message="Late."))
    response = await server.chat(stream=True)
    assert response.status == 504 and response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_that_breaks_off_is_an_error(server: Server, n: int) -> None:
    server.gateway.script = lambda submission: answer(submission, ["a", "b"], "error")
    chunks = events(await (await server.chat(stream=True, n=n)).text())
    assert chunks[-1]["error"]["code"] == "internal_error"
    assert (await server.chat(n=n)).status == 500


async def test_silence_is_filled_with_comments() -> None:
    gateway = FakeGateway()

    def script(submission: Tokenize) -> list[Any]:
        prompt, first, last = answer(submission, ["a", "b"])
        return [prompt, Pause(0.3), first, Pause(0.3), last]

    gateway.script = script
    async with serving(gateway, AppSettings(keep_alive_s=0.08)) as server:
        text = await (await server.chat(stream=True)).text()
    before, _, after = text.partition('"content":"a"')
    assert before.startswith(": keep-alive\n\n") and ": keep-alive\n\n" in after
    assert len(events(text)) == 3


async def test_a_problem_after_long_silence_is_an_event() -> None:
    gateway = FakeGateway()
    gateway.script = lambda submission: [5, Pause(0.2), PROBLEM]
    async with serving(gateway, AppSettings(keep_alive_s=0.05)) as server:
        response = await server.chat(stream=True)
    (error,) = events(await response.text())
    assert response.status == 200 and error["error"]["code"] == "too_many_migrations"


async def closed(server: Server, count: int = 1) -> None:
    await until(lambda: sum(bool(s.closed) for s in server.gateway.streams) >= count)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shown", [0, 1])
async def test_a_client_that_leaves_closes_its_streams(
    server: Server, stream: bool, n: int, shown: int
) -> None:
    def script(submission: Tokenize) -> list[Any]:
        return [*answer(submission, ["a", "b", "c"])[: 1 + shown], Pause(60)]

    server.gateway.script = script
    body = json.dumps(chat_body(stream=stream, n=n)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    if stream and shown:
        await reader.readuntil(b'"content":"a"')
    else:
        await until(lambda: len(server.gateway.streams) == n)
    writer.close()
    await closed(server, n)
    server.gateway.script = lambda s: answer(s, ["ok"])
    assert (await server.chat()).status == 200


async def test_a_reader_that_stands_still_is_cut_off() -> None:
    gateway = FakeGateway()

    def script(submission: Tokenize) -> list[Any]:
        delta = TextDelta(
            request_id="r", attempt=1, position=0, tokens=pack_tokens([1]), text="x" * 60_000
        )
        return [5, *[delta] * 2000]

    gateway.script = script
    async with serving(gateway, AppSettings(write_stall_s=0.3)) as server:
        body = json.dumps(chat_body(stream=True)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await closed(server)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert reader is not None
