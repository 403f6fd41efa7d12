"""What an answer must be, and what is told apart in it: from the body to the tokenizer and back."""

import json
from typing import Any

import aiohttp
import msgspec
import pytest

from frontend.catalogue import chosen, schema, tool
from frontend.fakes import Pause, Server, answer, chat_body, entry
from slipstream.frontend.gateway import StreamItem
from slipstream.messages import ChatPrompt, Part, PartKind, TextDelta, Tokenize
from slipstream.types import Constraint, ConstraintKind

CONTENT, REASONING = PartKind.CONTENT, PartKind.REASONING
CALL, ARGUMENTS = PartKind.CALL, PartKind.ARGUMENTS
TOOLS = [tool("f", description="d", parameters={"type": "object"}, unknown=1), tool("g")]


def parts(*deltas: list[Part]) -> Any:
    """A script of answers that are told apart."""

    def script(submission: Tokenize) -> list[StreamItem]:
        items = answer(submission, ["x"] * len(deltas))
        told = iter(deltas)
        return [
            msgspec.structs.replace(item, text="", parts=next(told), stop_reason=None)
            if isinstance(item, TextDelta)
            else item
            for item in items
        ]

    return script


TWO_CALLS = parts(
    [Part(REASONING, "I "), Part(REASONING, "think")],
    [Part(CONTENT, "Well"), Part(CALL, "f"), Part(ARGUMENTS, '{"a"')],
    [],
    [Part(ARGUMENTS, ": 1}"), Part(CALL, "g"), Part(ARGUMENTS, "{}")],
)


async def prompt_of(server: Server, **members: Any) -> ChatPrompt:
    response = await server.chat(**members)
    assert response.status == 200, await response.text()
    prompt = server.gateway.submissions[-1].prompt
    assert isinstance(prompt, ChatPrompt) and server.gateway.submissions[-1].parse
    return prompt


async def test_tools_are_rebuilt_from_what_is_allowed_in_them(server: Server) -> None:
    prompt = await prompt_of(server, tools=TOOLS)
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    plain = {"type": "function", "function": {"name": "g"}}
    assert prompt.tools == [{"type": "function", "function": function}, plain]
    assert (prompt.tool_choice, prompt.parallel_tool_calls) == ("auto", True)


@pytest.mark.parametrize(
    ("choice", "names", "word"),
    [
        ("none", ["f", "g"], "none"),
        ("required", ["f", "g"], "required"),
        (chosen("g"), ["f", "g"], "=g"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [chosen("g")]},
            },
            ["g"],
            "required",
        ),
    ],
)
async def test_choices_of_tools(server: Server, choice: Any, names: list[str], word: str) -> None:
    prompt = await prompt_of(server, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert [one["function"]["name"] for one in prompt.tools or []] == names
    assert (prompt.tool_choice, prompt.parallel_tool_calls) == (word, False)


@pytest.mark.parametrize(
    ("members", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json", ""),
        ({"response_format": schema({"type": "array"})}, "json_schema", '{"type":"array"}'),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema", '{"type":"null"}'),
        ({"structured_outputs": {"json": '{"a":1}', "regex": None}}, "json_schema", '{"a":1}'),
        ({"structured_outputs": {"json_object": True}}, "json", ""),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
    ],
)
@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_constraints(
    server: Server, path: str, members: dict[str, Any], kind: str, text: str
) -> None:
    assert (await getattr(server, path)(**members)).status == 200
    (param,) = members
    lenient = "json_schema" in members.get("response_format", ())
    wanted = Constraint(kind=ConstraintKind(kind), text=text, lenient=lenient, param=param)
    assert server.gateway.submissions[-1].constraint == wanted


async def test_biases_bars_and_priorities(server: Server) -> None:
    response = await server.chat(
        logit_bias={"5": -100, "7": 1.5}, allowed_token_ids=[5, 7], bad_words=["no"], priority=-3
    )
    assert response.status == 200
    submission = server.gateway.submissions[-1]
    assert submission.sampling.logit_bias == ((5, -100.0), (7, 1.5))
    assert submission.sampling.allowed_token_ids == (5, 7)
    assert (submission.bad_words, submission.priority) == (("no",), -3)


async def test_going_on_with_the_last_message(server: Server) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]
    prompt = await prompt_of(server, messages=messages, continue_final_message=True)
    assert prompt.continue_final_message and not prompt.add_generation_prompt


async def test_an_answer_with_calls(server: Server) -> None:
    server.gateway.script = TWO_CALLS
    body = await (await server.chat(tools=TOOLS)).json()
    (choice,) = body["choices"]
    calls = choice["message"]["tool_calls"]
    assert [(one["type"], one["function"]) for one in calls] == [
        ("function", {"name": "f", "arguments": '{"a": 1}'}),
        ("function", {"name": "g", "arguments": "{}"}),
    ]
    assert len({one["id"] for one in calls}) == 2 and calls[0].keys() == {"id", "type", "function"}
    message = choice["message"]
    assert message["content"] == "Well" and choice["finish_reason"] == "tool_calls"
    assert message["reasoning"] == message["reasoning_content"] == "I think"


async def test_an_answer_of_calls_alone_has_no_content(server: Server) -> None:
    server.gateway.script = parts([Part(CALL, "f"), Part(ARGUMENTS, "{}")])
    for choice, reason in (("required", "tool_calls"), (chosen("f"), "stop")):
        body = await (await server.chat(tools=TOOLS, tool_choice=choice)).json()
        assert body["choices"][0]["message"]["content"] is None
        assert body["choices"][0]["finish_reason"] == reason


async def test_an_answer_with_calls_as_a_stream(server: Server) -> None:
    server.gateway.script = TWO_CALLS
    text = await (await server.chat(tools=TOOLS, stream=True, logprobs=True)).text()
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    said = {"content": "", "reasoning": "", "reasoning_content": ""}
    for choice in choices[1:]:
        delta = choice["delta"]
        assert len(delta) <= 3 and "role" not in delta
        for name in said:
            said[name] += delta.get(name, "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["type"] == "function" and call["id"].startswith("call_")
                calls.append(call["function"])
            else:
                assert call.keys() == {"index", "function"} and call["index"] == len(calls) - 1
                calls[-1]["arguments"] += call["function"]["arguments"]
    assert said == {"content": "Well", "reasoning": "I think", "reasoning_content": "I think"}
    assert calls == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None] * (len(choices) - 1) + ["tool_calls"]
    scored = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    assert len(scored) == 4, "one for each delta"


def scored(script: Any) -> Any:
    """With log probabilities of a prompt of three tokens."""

    def more(submission: Tokenize) -> list[StreamItem]:
        items = script(submission)
        top = submission.sampling.prompt_logprobs
        if top is None:
            return list(items)
        prompt = [entry("A", float("nan"))]
        prompt += [entry(text, -2.0, (entry("alt", -1.0),) * top) for text in ("bb", "c")]
        items[1] = msgspec.structs.replace(items[1], prompt_logprobs=prompt)
        return list(items)

    return more


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_with_logprobs(server: Server, stream: bool, max_tokens: int) -> None:
    """As lm-eval asks."""
    server.gateway.script = scored(server.gateway.script)
    response = await server.complete(
        *(), prompt="Abbc", echo=True, logprobs=1, max_tokens=max_tokens, stream=stream
    )
    sampling = server.gateway.submissions[-1].sampling
    assert (sampling.max_tokens, sampling.prompt_logprobs) == (max_tokens or 1, 1)
    tokens = ["A", "bb", "c"] + (["Hello", " world"] if max_tokens else [])
    wanted = {
        "tokens": tokens,
        "token_logprobs": [None, -2.0, -2.0, -0.5, -0.5][: len(tokens)],
        "top_logprobs": [
            *(None, {"bb": -2.0, "alt": -1.0}, {"c": -2.0, "alt": -1.0}),
            *({"Hello": -0.5, "alt0": -1.0}, {" world": -0.5, "alt0": -1.0}),
        ][: len(tokens)],
        "text_offset": [0, 1, 3, 4, 9][: len(tokens)],
    }
    text = "Abbc" + ("Hello world" if max_tokens else "")
    if not stream:
        body = await response.json()
        (choice,) = body["choices"]
        assert choice["logprobs"] == wanted and choice["text"] == text
        assert body["usage"]["completion_tokens"] == (2 if max_tokens else 0)
        assert choice["finish_reason"] == ("stop" if max_tokens else "length")
        assert "prompt_logprobs" not in choice
        return
    raw = await response.text()
    chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    heard: dict[str, list[Any]] = {name: [] for name in wanted}
    for chunk in chunks:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            heard[name] += values
    assert heard == wanted
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


async def test_prompt_logprobs(server: Server) -> None:
    server.gateway.script = scored(server.gateway.script)
    body = await (await server.complete(prompt_logprobs=1)).json()
    two = {
        "2": {"logprob": -2.0, "decoded_token": "bb"},
        "3": {"logprob": -1.0, "decoded_token": "alt"},
    }
    one = {
        "1": {"logprob": -2.0, "decoded_token": "c"},
        "3": {"logprob": -1.0, "decoded_token": "alt"},
    }
    assert body["choices"][0]["prompt_logprobs"] == [None, two, one]
    body = await (await server.chat(prompt_logprobs=0)).json()
    assert [entry and list(entry) for entry in body["prompt_logprobs"]] == [None, ["2"], ["1"]]
    assert "prompt_logprobs" not in await (await server.chat()).json()


async def test_an_answer_is_not_repeated_a_thousand_times_on_the_bus(server: Server) -> None:
    format_ = schema({"description": "x" * 90_000})
    response = await server.complete(prompt=["a"] * 64, n=16, response_format=format_)
    assert response.status == 413 and not server.gateway.submissions
    assert (await response.json())["error"]["code"] == "request_too_large"
    assert (await server.complete(prompt=["a"] * 64, n=2, response_format=format_)).status == 200


async def test_of_tokens_that_look_alike_the_likeliest_counts(server: Server) -> None:
    def script(submission: Tokenize) -> list[StreamItem]:
        items = answer(submission, ["x"])
        alike = entry("?", -0.1, (entry("?", -0.1), entry("?", -5.0)))
        return [items[0], msgspec.structs.replace(items[1], logprobs=[alike])]

    server.gateway.script = script
    body = await (await server.complete(logprobs=2)).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"?": -0.1}]


async def test_a_bug_in_the_middle_of_an_answer_is_no_second_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[object]:
        raise KeyError("a bug")

    server.gateway.script = lambda s: [
        *answer(s, ["a", "b"])[:2],
        Pause(0.1),
        *answer(s, ["c"])[1:],
    ]
    url, body = f"{server.url}/v1/chat/completions", chat_body(stream=True)
    async with server.client.post(url, json=body) as response:
        assert b"assistant" in await response.content.readuntil(b"\n\n")
        monkeypatch.setattr("slipstream.frontend.chat_api._deltas", broken)
        with pytest.raises(aiohttp.ClientError):
            raise AssertionError(await response.content.read())
    monkeypatch.undo()
    assert (await server.chat()).status == 200
