"""/v1/messages through Anthropic's client, and its events held against Anthropic's types."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent

from frontend.fakes import MODEL, Pause, Server, answer, call, parted, speak, think
from frontend.test_responses import strict
from slipstream.errors import ERRORS, ErrorCode, Problem
from slipstream.messages import ChatPrompt
from slipstream.types import Constraint, ConstraintKind

EVENTS = pydantic.TypeAdapter[Any](RawMessageStreamEvent)
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture
async def client(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


async def post(server: Server, **members: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": HI, "max_tokens": 8, **members}
    response = await server.post("/v1/messages", body)
    assert response.status == 200, await response.text()
    reply = await response.json()
    strict(Message.model_validate(reply))
    return dict(reply)


async def events_of(server: Server, **members: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "messages": HI, "max_tokens": 8, "stream": True, **members}
    response = await server.post("/v1/messages", body)
    assert response.status == 200, await response.text()
    found = []
    for frame in (await response.text()).split("\n\n")[:-1]:
        *ids, name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["type"] == "error" or ids[0].startswith("id: msg_")
        if event["type"] not in ("ping", "error"):
            strict(EVENTS.validate_python(event))
        found.append(event)
    return found


def prompt(server: Server) -> ChatPrompt:
    asked = server.gateway.submissions[-1].prompt
    assert isinstance(asked, ChatPrompt)
    return asked


async def test_an_answer(server: Server, client: anthropic.AsyncAnthropic) -> None:
    reply = await client.messages.create(
        model=MODEL,
        max_tokens=8,
        system=[{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "B"}],
        messages=HI,
        extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.9},
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        thinking={"type": "disabled"},
    )  # fmt: skip
    strict(reply)
    assert [block.text for block in reply.content] == ["Hello world"]
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "END")
    usage = reply.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (3, 2, 2)
    assert reply.id.startswith("msg_") and reply._request_id
    (submission,) = server.gateway.submissions
    sampling = submission.sampling
    assert (sampling.max_tokens, sampling.stop, sampling.top_k) == (8, ("END",), 3)
    assert prompt(server).messages == [{"role": "system", "content": "A\n\nB"}, *HI]
    assert submission.parse and [s.closed for s in server.gateway.streams] == [1]


async def test_an_answer_has_no_member_more(server: Server) -> None:
    """The AI SDK takes no null where Anthropic sends none."""
    reply = await post(server)
    assert reply.pop("id").startswith("msg_")
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello world"}],
        "stop_reason": "stop_sequence",
        "stop_sequence": "END",
        "usage": {
            "input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 2,
        },
    }


async def test_a_stream(server: Server, client: anthropic.AsyncAnthropic) -> None:
    events = await events_of(server)
    assert [event["type"] for event in events] == [
        *("message_start", "ping", "content_block_start", "content_block_delta"),
        *("content_block_delta", "content_block_stop", "message_delta", "message_stop"),
    ]
    assert events[0]["message"]["usage"]["input_tokens"] == 5
    assert events[-2]["usage"]["cache_read_input_tokens"] == 2
    async with client.messages.stream(model=MODEL, max_tokens=8, messages=HI) as stream:
        assert "".join([text async for text in stream.text_stream]) == "Hello world"
        final = await stream.get_final_message()
    assert (final.stop_reason, final.usage.input_tokens) == ("stop_sequence", 3)


async def test_stream_and_whole_answer_are_one(
    server: Server, client: anthropic.AsyncAnthropic
) -> None:
    server.gateway.script = lambda s: parted(
        s, [think("hm")], [think("!"), speak("a")], call("weather", '{"city":"x"}'), call("none")
    )
    async with client.messages.stream(model=MODEL, max_tokens=8, messages=HI) as stream:
        streamed = await stream.get_final_message()
    whole = await client.messages.create(model=MODEL, max_tokens=8, messages=HI)
    for reply in (streamed, whole):
        strict(reply)
        thought, said, called, empty = reply.content
        assert (thought.thinking, said.text, called.input) == ("hm!", "a", {"city": "x"})
        assert called.id != empty.id and empty.input == {} and reply.stop_reason == "tool_use"
        assert reply.usage.output_tokens_details.thinking_tokens == 1


async def test_a_tool_loop(server: Server, client: anthropic.AsyncAnthropic) -> None:
    server.gateway.script = lambda s: parted(s, [think("T"), *call("weather", '{"city":"Ulm"}')])
    first = await client.messages.create(
        model=MODEL, max_tokens=8, messages=HI, tools=[WEATHER],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )  # fmt: skip
    assert prompt(server).tool_choice == "required" and not prompt(server).parallel_tool_calls
    function = {
        "name": "weather",
        "description": "Of a city.",
        "parameters": WEATHER["input_schema"],
    }
    assert prompt(server).tools == [{"type": "function", "function": function}]
    called = first.content[1]
    result = {
        "type": "tool_result",
        "tool_use_id": called.id,
        "content": [{"type": "text", "text": "rain"}],
    }
    told = [{"type": "text", "text": "Ah."}, result, {"type": "text", "text": "So?"}]
    asked = [
        *HI,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": told},
    ]
    await client.messages.create(model=MODEL, max_tokens=8, messages=asked, tools=[WEATHER])
    call_out = {"name": "weather", "arguments": '{"city":"Ulm"}'}
    assert prompt(server).messages == [
        *HI,
        {
            "role": "assistant",
            "tool_calls": [{"id": called.id, "type": "function", "function": call_out}],
            "content": None,
            "reasoning_content": "T",
        },
        {"role": "tool", "content": "rain", "tool_call_id": called.id},
        {"role": "user", "content": "Ah.\n\nSo?"},
    ]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "weather"}, "=weather"),
    ],
)
async def test_tool_choices(server: Server, choice: dict[str, str], wanted: str) -> None:
    await post(server, tools=[WEATHER], tool_choice=choice)
    assert prompt(server).tool_choice == wanted


async def test_the_beginning_of_the_answer(server: Server) -> None:
    await post(server, messages=[*HI, {"role": "assistant", "content": "Well,"}])
    assert prompt(server).continue_final_message and not prompt(server).add_generation_prompt
    await post(server)
    assert not prompt(server).continue_final_message and prompt(server).add_generation_prompt


def turn(role: str, *blocks: str | dict[str, Any]) -> dict[str, Any]:
    texts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in blocks]
    return {"role": role, "content": texts}


async def test_turns_of_one_role_are_one(server: Server) -> None:
    """As Anthropic has it; templates that want roles to alternate would refuse them."""
    begun = [turn("assistant", "d"), {"role": "assistant", "content": "e"}]
    await post(server, messages=[*HI, turn("user", "b", "c"), *begun], system="S")
    assert prompt(server).messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi\n\nb\n\nc"},
        {"role": "assistant", "content": "d\n\ne"},
    ]
    assert prompt(server).continue_final_message and not prompt(server).add_generation_prompt
    foreign = turn("user", {"type": "tool_result", "tool_use_id": "z", "content": "x"})
    body = {"model": MODEL, "messages": [*HI, *HI, foreign], "max_tokens": 8}
    response = await server.post("/v1/messages", body)
    told = (await response.json())["error"]["message"]
    assert response.status == 400 and "messages[2]" in told, "as the client counts them"


async def test_results_stay_messages_of_their_own(server: Server) -> None:
    uses = [{"type": "tool_use", "id": name, "name": "weather", "input": {}} for name in "xy"]
    results = [{"type": "tool_result", "tool_use_id": name, "content": name} for name in "xy"]
    thought = {"type": "thinking", "thinking": "T", "signature": ""}
    asked = [
        *HI,
        turn("assistant", "Well."),
        turn("assistant", uses[0]),
        turn("assistant", thought, uses[1], "So."),
        *(turn("user", one) for one in (*results, "And?", "Well?")),
    ]
    await post(server, messages=asked, tools=[WEATHER])
    said, first, second, more = prompt(server).messages[1:]
    assert (said["content"], said["reasoning_content"]) == ("Well.\n\nSo.", "T")
    assert [call["id"] for call in said["tool_calls"]] == ["x", "y"]
    assert [first, second] == [{"role": "tool", "content": n, "tool_call_id": n} for n in "xy"]
    assert more == {"role": "user", "content": "And?\n\nWell?"}


async def test_a_format(server: Server) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    await post(server, output_config={"format": form, "effort": "low"})
    wanted = Constraint(
        kind=ConstraintKind.JSON_SCHEMA, text='{"type":"object"}', param="response_format"
    )
    assert server.gateway.submissions[-1].constraint == wanted


async def test_why_it_stopped(server: Server) -> None:
    server.gateway.script = lambda s: answer(s, ["a"], "length")
    assert (await post(server))["stop_reason"] == "max_tokens"
    server.gateway.script = lambda s: parted(s, [speak("a")])
    reply = await post(server)
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("end_turn", None)
    server.gateway.script = lambda s: parted(s, call("weather", '{"city')[:2], reason="length")
    reply = await post(server, tools=[WEATHER])
    assert (reply["stop_reason"], reply["content"][0]["input"]) == ("max_tokens", {})


async def test_tokens_are_counted(server: Server, client: anthropic.AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(
        model=MODEL, messages=HI, system="S", tools=[WEATHER]
    )
    assert counted.input_tokens == 2
    ((asked, _),) = server.gateway.codec_calls
    assert isinstance(asked, ChatPrompt) and asked.tools and len(asked.messages) == 2


async def test_what_claude_code_sends_is_let_in(server: Server) -> None:
    """Beta fields, server tools, blocks with what is cached."""
    body = {
        "model": MODEL,
        "max_tokens": 8,
        "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "U", "cache_control": {}}]}
        ],
        "tools": [{**WEATHER, "cache_control": {}}, {"type": "web_search_20250305", "name": "w"}],
        "thinking": {"type": "enabled", "budget_tokens": 4},
        "metadata": {"user_id": "u"},
        "context_management": {"edits": []},
        "stream": True,
    }
    headers = {"x-api-key": "none", "anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    response = await server.post("/v1/messages?beta=true", body, **headers)
    assert response.status == 200, await response.text()
    skipped = response.headers["x-slipstream-skipped-tools"]
    assert skipped == "tools[1]='web_search_20250305'"


async def test_fields_beyond_anthropics(server: Server) -> None:
    drawn = {"min_p": 0.1, "seed": 3, "presence_penalty": 0.5, "repetition_penalty": 1.5}
    given = {"cache_salt": "s", "priority": 3, "timeout": 0.5, "chat_template_kwargs": {"a": 1}}
    await post(server, **drawn, **given)
    asked = server.gateway.submissions[-1]
    assert {name: getattr(asked.sampling, name) for name in drawn} == drawn
    assert (asked.salt, asked.priority, asked.timeout_s) == ("s", 3, 0.5)
    assert prompt(server).template_args == {"a": 1}


DEEP: dict[str, Any] = {}
for _ in range(500):
    DEEP = {"x": DEEP}
IMAGE = [
    {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "file:/x"}}]}
]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 500}, "max_tokens is 500"),
        ({"messages": []}, "messages is empty"),
        ({"messages": IMAGE}, "messages[0].content[0] is of type 'image'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"stop_sequences": [""]}, "A stop string must"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a",
           "name": "f", "input": DEEP}]}]}, "messages[0].content[0].input is nested"),
        ({"chat_template_kwargs": DEEP}, "chat_template_kwargs is nested"),
        ({"temperature": 1.5}, "temperature must be at least 0 and at most 1"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a call"),
        ({"tool_choice": {"type": "often"}}, "tool_choice must be"),
        ({"container": "c"}, "'container' is not served"),
        ({"output_config": {"format": {"type": "yaml"}}}, "output_config.format"),
    ],
)  # fmt: skip
async def test_refused(server: Server, members: dict[str, Any], said: str) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 8, **members}
    response = await server.post("/v1/messages", body)
    reply = await response.json()
    assert response.status == 400 and not server.gateway.streams
    assert reply.keys() == {"type", "error", "request_id"} and reply["type"] == "error"
    assert reply["error"].keys() == {"type", "message"}
    assert reply["error"]["type"] == "invalid_request_error" and said in reply["error"]["message"]
    assert reply["request_id"] == response.headers["request-id"]


async def test_each_error_is_one_of_the_clients(
    server: Server, client: anthropic.AsyncAnthropic
) -> None:
    for code, spec in ERRORS.items():
        server.gateway.refuse(Problem(code=code, message="No."))
        with pytest.raises(anthropic.APIStatusError) as caught:
            await client.messages.create(model=MODEL, max_tokens=8, messages=HI)
        if spec.status == 413:
            continue  # documented, but not among the client's types
        strict(anthropic.types.ErrorResponse.model_validate(caught.value.body))
        assert caught.value.status_code == spec.status
        assert caught.value.body["error"]["message"] == "No."


async def test_errors_on_its_paths_have_its_shape(server: Server) -> None:
    asked = [
        (await server.client.get(server.url + "/v1/messages"), 405, "invalid_request_error"),
        (await server.post("/v1/messages", b"{"), 400, "invalid_request_error"),
        (await server.post("/v1/messages", {}, **{"Content-Type": "x/y"}), 415, None),
        (await server.post("/v1/messages", {"x": "x" * 200_000}), 413, "request_too_large"),
        (await server.post("/v1/messages/batches", {}), 404, "not_found_error"),
        (await server.post("/v1/messages/other", {}), 404, "not_found_error"),
    ]
    for response, status, kind in asked:
        reply = await response.json()
        assert (response.status, reply["type"]) == (status, "error")
        assert kind in (None, reply["error"]["type"])


async def test_a_failure_in_mid_stream_is_an_event(
    server: Server, client: anthropic.AsyncAnthropic
) -> None:
    late = Problem(code=ErrorCode.DEADLINE, message="Too late.")
    server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], Pause(0.01), late]
    last = (await events_of(server))[-1]
    assert last["type"] == "error" and last["error"]["type"] == "timeout_error"
    stream = await client.messages.create(model=MODEL, max_tokens=8, messages=HI, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="Too late"):
        [event async for event in stream]
