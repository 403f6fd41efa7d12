"""Whole answers, what reaches the tokenizer, and the paths that generate nothing."""

from typing import Any

import msgspec
import pytest

from frontend.fakes import FakeGateway, Server, answer, chat_body, entry, serving
from slipstream.core.machine import DeliverCodec
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.app import AppSettings
from slipstream.frontend.gateway import ModelCard
from slipstream.messages import ChatPrompt, TextPrompt, Tokenize, TokenPrompt
from slipstream.types import SamplingParams, pack_tokens


async def sampling(server: Server, path: str = "chat", **members: Any) -> SamplingParams:
    response = await getattr(server, path)(**members)
    assert response.status == 200, await response.text()
    return server.gateway.submissions[-1].sampling


async def test_a_chat_answer(server: Server) -> None:
    response = await server.chat()
    body = await response.json()
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": "demo",
        "system_fingerprint": "slipstream",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": "END",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert response.headers["x-slipstream-path"] == "prefill-0>decode-0"
    assert response.headers["x-slipstream-decision"] == "policy=cost; ttft_ms=12.0"
    assert [stream.closed for stream in server.gateway.streams] == [1]


async def test_a_completion_answer(server: Server) -> None:
    body = await (await server.complete()).json()
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hello world",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": "END",
        }
    ]


async def test_chat_submission(server: Server) -> None:
    await server.chat(
        messages=[
            {"role": "system", "content": "S", "cache_control": {"x": 2**70}},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "N"},
        ],
        chat_template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        cache_salt="tenant",
        timeout=2.5,
    )
    (submission,) = server.gateway.submissions
    assert submission.prompt == ChatPrompt(
        messages=[
            {"role": "system", "content": "S"},
            {"role": "user", "content": "a", "name": "N"},
        ],
        add_generation_prompt=False,
        template_args={"enable_thinking": False},
    )
    assert (submission.salt, submission.timeout_s) == ("tenant", 2.5)
    assert submission.clamp_max_tokens and submission.sampling.max_tokens == 100
    assert submission.request_id.endswith("-0")


async def test_defaults(server: Server) -> None:
    first = await sampling(server)
    second = await sampling(server)
    assert first.seed != second.seed and 0 <= first.seed < 2**63
    plain = SamplingParams(max_tokens=100, seed=first.seed)
    assert first == plain
    assert server.gateway.submissions[0].timeout_s == 600.0
    completion = await sampling(server, "complete")
    assert completion.max_tokens == 16 and server.gateway.submissions[-1].clamp_max_tokens


async def test_what_is_named_is_what_is_sampled(server: Server) -> None:
    named = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "seed": -3,
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    given = await sampling(server, stop="END", **named)
    expected = {**named, "stop_token_ids": (3, 4), "stop": ("END",)}
    assert {name: getattr(given, name) for name in expected} == expected
    assert not server.gateway.submissions[-1].clamp_max_tokens
    assert (await sampling(server, max_completion_tokens=8)).max_tokens == 8
    assert (await sampling(server, top_k=-1)).top_k == 0
    assert (await sampling(server, stop=["a", "b"])).stop == ("a", "b")
    assert (await sampling(server, logprobs=True)).logprobs == 0
    assert (await sampling(server, logprobs=True, top_logprobs=20)).logprobs == 20
    assert (await sampling(server, logprobs=False)).logprobs is None
    assert (await sampling(server, "complete", logprobs=0)).logprobs == 0


async def test_the_models_defaults_yield_to_the_client() -> None:
    gateway = FakeGateway()
    recommended = {"temperature": 0.25, "top_k": 20}
    gateway.now = msgspec.structs.replace(gateway.now, sampling=recommended)
    async with serving(gateway, AppSettings()) as server:
        given = await sampling(server, top_k=5)
        assert (given.temperature, given.top_k, given.top_p) == (0.25, 5, 1.0)
        assert (await sampling(server, temperature=0)).temperature == 0


async def test_time_budgets(server: Server) -> None:
    body = chat_body(timeout=9)
    await server.post("/v1/chat/completions", body, **{"X-Request-Timeout-Ms": "1500"})
    assert server.gateway.submissions[-1].timeout_s == 1.5
    await server.post("/v1/chat/completions", body, **{"X-Request-Timeout-Ms": "20000"})
    assert server.gateway.submissions[-1].timeout_s == 9.0, "the least of both"
    await server.post("/v1/chat/completions", chat_body(), **{"X-Request-Timeout-Ms": "9000000"})
    assert server.gateway.submissions[-1].timeout_s == 9000.0, "what is asked for, not the default"


async def test_several_choices(server: Server) -> None:
    server.gateway.script = lambda s: answer(s, [f"c{s.sampling.choice}", "!"])
    body = await (await server.chat(n=3, seed=1)).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["c0!", "c1!", "c2!"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 5 and body["usage"]["completion_tokens"] == 6
    ids = [submission.request_id for submission in server.gateway.submissions]
    assert ids == [f"{body['id']}-{i}" for i in range(3)]
    assert {submission.sampling.seed for submission in server.gateway.submissions} == {1}


async def test_several_prompts(server: Server) -> None:
    def script(submission: Tokenize) -> list[Any]:
        assert isinstance(submission.prompt, TextPrompt)
        return list(answer(submission, [submission.prompt.text, str(submission.sampling.choice)]))

    server.gateway.script = script
    body = await (await server.complete(prompt=["a", "b"], n=2, add_special_tokens=False)).json()
    assert [choice["text"] for choice in body["choices"]] == ["a0", "a1", "b0", "b1"]
    assert body["usage"]["prompt_tokens"] == 10 and body["usage"]["completion_tokens"] == 8
    seeds = [submission.sampling.seed for submission in server.gateway.submissions]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    prompts = [submission.prompt for submission in server.gateway.submissions]
    assert prompts[0] == TextPrompt(text="a", add_special_tokens=False)


async def test_prompts_of_token_ids(server: Server) -> None:
    await server.complete(prompt=[[1, 2], [3]])
    prompts = [submission.prompt for submission in server.gateway.submissions]
    assert prompts == [TokenPrompt(tokens=pack_tokens(ids)) for ids in ([1, 2], [3])]


async def test_echo(server: Server) -> None:
    body = await (await server.complete(prompt="Say ", echo=True)).json()
    assert body["choices"][0]["text"] == "Say Hello world"
    body = await (await server.complete(prompt=[1, 2], echo=True, n=2)).json()
    assert [choice["text"] for choice in body["choices"]] == ["abHello world"] * 2
    assert server.gateway.codec_calls == [(None, [1, 2])]
    text = await (await server.complete(prompt="Say ", echo=True, stream=True)).text()
    assert '"text":"Say Hello"' in text and text.count("Say") == 1


async def test_chat_logprobs(server: Server) -> None:
    body = await (await server.chat(logprobs=True, top_logprobs=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["Hello", " world"]
    assert content[0] == {
        "token": "Hello",
        "logprob": -0.5,
        "bytes": [72, 101, 108, 108, 111],
        "top_logprobs": [
            {"token": "alt0", "logprob": -1.0, "bytes": [97, 108, 116, 48]},
            {"token": "alt1", "logprob": -2.0, "bytes": [97, 108, 116, 49]},
        ],
    }
    body = await (await server.chat(logprobs=True)).json()
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(server: Server, stream: bool) -> None:
    response = await server.complete(logprobs=1, stream=stream)
    if stream:
        text = await response.text()
        assert '"text_offset":[0]' in text and '"text_offset":[5]' in text
        return
    assert (await response.json())["choices"][0]["logprobs"] == {
        "tokens": ["Hello", " world"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"Hello": -0.5, "alt0": -1.0}, {" world": -0.5, "alt0": -1.0}],
        "text_offset": [0, 5],
    }


@pytest.mark.parametrize("logprob", [float("-inf"), float("nan"), -1e30])
async def test_logprobs_that_json_has_no_number_for(server: Server, logprob: float) -> None:
    def script(submission: Tokenize) -> list[Any]:
        items: list[Any] = answer(submission, ["x"])
        items[1].logprobs[0] = entry("x", logprob)
        return items

    server.gateway.script = script
    body = await (await server.chat(logprobs=True)).json()
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (ErrorCode.CONTEXT_LENGTH, 400, "invalid_request_error"),
        (ErrorCode.QUEUE_FULL, 429, "rate_limit_error"),
        (ErrorCode.NO_WORKER, 503, "server_error"),
        (ErrorCode.DEADLINE, 504, "server_error"),
        (ErrorCode.INTERNAL, 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_problems_become_statuses(
    server: Server, code: ErrorCode, status: int, kind: str, stream: bool
) -> None:
    server.gateway.refuse(Problem(code=code, message="M 5 of 4.", param="p", retry_after_s=2.2))
    response = await server.chat(stream=stream)
    assert response.status == status
    assert await response.json() == {
        "error": {"message": "M 5 of 4.", "type": kind, "param": "p", "code": code.value}
    }
    if status in (429, 503):
        assert response.headers["Retry-After"] == "3"
        assert response.headers["retry-after-ms"] == "2200"
    assert server.gateway.streams[0].closed


async def test_one_failed_choice_fails_all_and_closes_all(server: Server) -> None:
    def script(submission: Tokenize) -> list[Any]:
        problem = Problem(code=ErrorCode.NO_WORKER, message="None.")
        return [problem] if submission.sampling.choice == 1 else list(answer(submission, ["x"]))

    server.gateway.script = script
    assert (await server.chat(n=3)).status == 503
    assert all(stream.closed for stream in server.gateway.streams)


def changed(server: Server, **members: Any) -> None:
    old = server.gateway.now
    fields = {name: getattr(old, name) for name in old.__struct_fields__}
    server.gateway.now = type(old)(**{**fields, **members})


async def test_not_ready_and_draining(server: Server) -> None:
    for members, code, word in (
        (
            {"ready": False, "reason": "no decode worker", "refuses": "no decode worker"},
            *("not_ready", "not_ready"),
        ),
        ({"draining": True}, "draining", "draining"),
    ):
        changed(server, **members)
        for ask in (server.chat, server.complete):
            response = await ask()
            assert response.status == 503 and response.headers["Retry-After"] == "2"
            assert (await response.json())["error"]["code"] == code
        ready = await server.client.get(server.url + "/readyz")
        assert ready.status == 503 and ready.headers["Retry-After"] == "2"
        assert (await ready.json())["status"] == word
        assert (await server.client.get(server.url + "/livez")).status == 200
    assert server.gateway.submissions == []


async def get(server: Server, path: str) -> Any:
    response = await server.client.get(server.url + path)
    assert response.status == 200 and response.headers["x-request-id"]
    return await response.json()


async def test_readiness(server: Server) -> None:
    expected = {
        "status": "ready",
        "reason": "",
        "model": "demo",
        "max_model_len": 100,
        "models": [{"name": "demo", "ready": True, "reason": ""}],
        "nodes": [
            {
                "node_id": "decode-0",
                "role": "decode",
                "epoch": 7,
                "worker": {
                    "num_blocks": 64,
                    "block_bytes": 4096,
                    "transports": {"shm": "/x"},
                    "quantization": "none",
                },
            },
            {"node_id": "scheduler", "role": "scheduler", "epoch": 8, "worker": None},
        ],
    }
    assert await get(server, "/readyz") == expected == await get(server, "/health")
    assert await get(server, "/livez") == {"status": "alive"}


async def test_models_version_and_root(server: Server) -> None:
    listed = await get(server, "/v1/models")
    (card,) = listed["data"]
    assert listed["object"] == "list" and card == await get(server, "/v1/models/demo")
    assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 100)
    other = ModelCard(name="org/name", max_model_len=9, root="demo")
    changed(server, models=[*server.gateway.now.models, other])
    card = await get(server, "/v1/models/org/name")
    assert (card["id"], card["root"], card["max_model_len"]) == ("org/name", "demo", 9)
    assert [card["id"] for card in (await get(server, "/v1/models"))["data"]] == [
        "demo",
        "org/name",
    ]
    changed(server, models=[], model="", ready=False, refuses="no decode worker")
    assert (await get(server, "/v1/models"))["data"] == []
    assert (await get(server, "/version"))["version"]
    assert (await get(server, "/"))["name"] == "slipstream"
    response = await server.client.get(server.url + "/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert (await response.read()).startswith(b"slipstream_up 1\n")


async def test_tokenize_and_detokenize(server: Server) -> None:
    response = await server.post("/tokenize", {"prompt": "ab", "add_special_tokens": False})
    expected = {"count": 2, "max_model_len": 100, "tokens": [1, 2], "token_strs": None}
    assert await response.json() == expected
    body = {"messages": [{"role": "user", "content": "x"}], "return_token_strs": True}
    response = await server.post("/tokenize", {"model": "demo", **body})
    assert await response.json() == {**expected, "token_strs": ["a", "b"]}
    response = await server.post("/detokenize", {"tokens": [1, 2]})
    assert await response.json() == {"prompt": "ab"}
    assert server.gateway.codec_calls == [
        (TextPrompt(text="ab", add_special_tokens=False), []),
        (ChatPrompt(messages=body["messages"]), []),
        (None, [1, 2]),
    ]
    assert await (await server.post("/detokenize", {"tokens": []})).json() == {"prompt": ""}


async def test_tokens_of_a_message_that_goes_on(server: Server) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A"}]
    for more, generate, goes_on in (
        ({}, True, False),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
        ({"continue_final_message": False, "add_generation_prompt": False}, False, False),
    ):
        response = await server.post("/tokenize", {"messages": messages, **more})
        assert response.status == 200
        asked, _ = server.gateway.codec_calls[-1]
        assert asked == ChatPrompt(
            messages=messages, add_generation_prompt=generate, continue_final_message=goes_on
        ), more


async def test_tools_are_tokens_too(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "f", "x": 1}}]
    response = await server.post("/tokenize", chat_body(tools=tools))
    assert response.status == 200
    ((asked, _),) = server.gateway.codec_calls
    assert isinstance(asked, ChatPrompt)
    assert asked.tools == [{"type": "function", "function": {"name": "f"}}]
    assert (await server.post("/tokenize", chat_body(tools=[{}]))).status == 400


async def test_problems_of_the_codec(server: Server) -> None:
    problem = Problem(code=ErrorCode.NO_WORKER, message="No tokenizer.")
    server.gateway.coded = DeliverCodec("c", problem=problem)
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert (await server.post(path, body)).status == 503
    assert (await server.complete(prompt=[1], echo=True)).status == 503
    assert server.gateway.streams == []
