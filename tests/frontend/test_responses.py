"""/v1/responses through OpenAI's client, and its events held against OpenAI's types."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from frontend.fakes import MODEL, Pause, Server, answer, call, parted, speak, think
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import ChatPrompt
from slipstream.types import Constraint, ConstraintKind

EVENTS = pydantic.TypeAdapter[Any](ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}


def strict(value: Any) -> None:
    """Nothing is in it that its type does not know, but for bytes of an event's tokens, which the
    whole answer has."""
    if isinstance(value, pydantic.BaseModel):
        extra = set(value.model_extra or ()) - {"bytes"}
        assert not extra, (type(value).__name__, extra)
        for name in type(value).model_fields:
            strict(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            strict(one)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=0
    ) as made:
        yield made


async def post(server: Server, **members: Any) -> dict[str, Any]:
    response = await server.post("/v1/responses", {"model": MODEL, "input": "Hi", **members})
    assert response.status == 200, await response.text()
    body = await response.json()
    strict(Response.model_validate(body))
    return dict(body)


async def events_of(server: Server, **members: Any) -> list[dict[str, Any]]:
    """Each of them by its name, numbered, and of OpenAI's type."""
    body = {"model": MODEL, "input": "Hi", "stream": True, **members}
    response = await server.post("/v1/responses", body)
    assert response.status == 200, await response.text()
    found = []
    for frame in (await response.text()).split("\n\n")[:-1]:
        *ids, name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == len(found)
        assert ids[0].startswith("id: resp_")
        strict(EVENTS.validate_python(event))
        found.append(event)
    return found


def prompt(server: Server) -> ChatPrompt:
    asked = server.gateway.submissions[-1].prompt
    assert isinstance(asked, ChatPrompt)
    return asked


async def refused(server: Server, code: str, param: str | None, **members: Any) -> str:
    response = await server.post("/v1/responses", {"model": MODEL, "input": "Hi", **members})
    error = (await response.json())["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert 400 <= response.status < 500 and not server.gateway.streams
    return str(error["message"])


async def test_an_answer(server: Server, client: openai.AsyncOpenAI) -> None:
    reply = await client.responses.create(
        model=MODEL, input="Hi", instructions="Be short.", metadata={"a": "b"}, temperature=0.5
    )
    strict(reply)
    assert reply.output_text == "Hello world" and reply.status == "completed"
    assert reply.usage and reply.usage.input_tokens_details.cached_tokens == 2
    assert (reply.temperature, reply.metadata, reply.error) == (0.5, {"a": "b"}, None)
    assert prompt(server).messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
    ]
    (submission,) = server.gateway.submissions
    assert submission.parse and submission.request_id == f"{reply.id}-0"
    assert reply.id.startswith("resp_") and [s.closed for s in server.gateway.streams] == [1]


async def test_a_stream(server: Server, client: openai.AsyncOpenAI) -> None:
    events = await events_of(server)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done", "content_part.done"),
        *("output_item.done", "completed"),
    ]
    assert events[0]["response"]["output"] == [] and events[2]["item"]["content"] == []
    assert events[3]["part"]["text"] == "" and events[4]["delta"] == "Hello"
    async with client.responses.stream(model=MODEL, input="Hi") as stream:
        final = await stream.get_final_response()
    assert final.output_text == "Hello world" and final.status == "completed"


async def test_stream_and_whole_answer_are_one(server: Server) -> None:
    server.gateway.script = lambda s: parted(
        s, [think("hm")], [think("!"), speak("a")], [speak("b"), *call("weather", '{"city":"x"}')],
        call("weather", "{}"), reason="length",
    )  # fmt: skip
    last = (await events_of(server, tools=[WEATHER]))[-1]
    assert last["type"] == "response.incomplete"
    streamed, whole = last["response"], await post(server, tools=[WEATHER])
    assert [item["type"] for item in whole["output"]] == [
        *("reasoning", "message", "function_call", "function_call")
    ]
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in whole["output"]] == ["completed"] * 3 + ["incomplete"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "hm!"}]
    assert whole["output"][2]["arguments"] == '{"city":"x"}'
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}
    name, own = streamed["id"][5:], whole["id"][5:]
    ids = {call["call_id"] for one in (streamed, whole) for call in one["output"][2:]}
    assert len(ids) == 4, "calls of two answers have two names"
    for one in (streamed, whole):
        del one["created_at"]
        for item in one["output"]:
            item.pop("call_id", None)
    assert json.loads(json.dumps(streamed).replace(name, own)) == whole


async def test_a_tool_loop(server: Server, client: openai.AsyncOpenAI) -> None:
    server.gateway.script = lambda s: parted(s, [], call("weather", '{"city":"Ulm"}'))
    first = await client.responses.create(
        model=MODEL, input="Weather in Ulm?", tools=[WEATHER], tool_choice="required",
        parallel_tool_calls=False, instructions="One",
    )  # fmt: skip
    strict(first)
    asked = first.output[0]
    assert (asked.type, asked.name, asked.arguments) == (
        "function_call",
        "weather",
        '{"city":"Ulm"}',
    )
    assert prompt(server).tool_choice == "required" and not prompt(server).parallel_tool_calls
    (tool,) = prompt(server).tools or []
    assert tool["function"].keys() == {"name", "description", "parameters", "strict"}
    server.gateway.script = lambda s: answer(s, ["Rain."])
    second = await client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": asked.call_id, "output": "rain"}],
        instructions="Two",
    )
    assert second.output_text == "Rain." and second.previous_response_id == first.id
    function = {"name": "weather", "arguments": '{"city":"Ulm"}'}
    history = [
        {"role": "user", "content": "Weather in Ulm?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": asked.call_id, "type": "function", "function": function}],
            "content": None,
        },
        {"role": "tool", "content": "rain", "tool_call_id": asked.call_id},
    ]
    assert prompt(server).messages == [{"role": "system", "content": "Two"}, *history]
    # The same with everything said by the client, and by references.
    stated = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather in Ulm?"}]},
        asked.model_dump(),
        {"type": "function_call_output", "call_id": asked.call_id, "output": "rain"},
    ]
    await client.responses.create(model=MODEL, input=stated, store=False)
    assert prompt(server).messages == history
    stated[1] = {"type": "item_reference", "id": asked.id}
    await client.responses.create(model=MODEL, input=stated)
    assert prompt(server).messages == history


async def test_formats_and_choices(server: Server) -> None:
    schema = {"type": "object"}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    body = await post(server, text={"format": form}, tools=[WEATHER],
                      tool_choice={"type": "function", "name": "weather"})  # fmt: skip
    wanted = Constraint(
        kind=ConstraintKind.JSON_SCHEMA, text='{"type":"object"}', param="response_format"
    )
    assert server.gateway.submissions[-1].constraint == wanted
    assert body["text"]["format"] == form and prompt(server).tool_choice == "=weather"
    other = {**WEATHER, "name": "other"}
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "other"}],
    }
    await post(server, tools=[WEATHER, other], tool_choice=allowed)
    assert [tool["function"]["name"] for tool in prompt(server).tools or []] == ["other"]
    assert prompt(server).tool_choice == "required"
    await post(server, tools=[WEATHER, other])
    assert [tool["function"]["name"] for tool in prompt(server).tools or []] == ["weather", "other"]
    await post(server, text={"format": {"type": "json_object"}})
    wanted = Constraint(kind=ConstraintKind.JSON, param="response_format")
    assert server.gateway.submissions[-1].constraint == wanted


async def test_tools_that_are_no_functions_are_skipped(server: Server) -> None:
    """Codex sends some always, and gives up at a 400."""
    tools = [{"type": "web_search"}, WEATHER, {"type": "custom", "name": "apply_patch"}]
    body = {"model": MODEL, "input": "Hi", "tools": tools}
    response = await server.post("/v1/responses", body)
    assert (
        response.headers["x-slipstream-skipped-tools"] == "tools[0]='web_search', tools[2]='custom'"
    )
    assert [tool["name"] for tool in (await response.json())["tools"]] == ["weather"]


async def test_logprobs(server: Server) -> None:
    body = await post(server, top_logprobs=2, include=["message.output_text.logprobs"])
    entries = body["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["Hello", " world"]
    assert [top["token"] for top in entries[0]["top_logprobs"]] == ["alt0", "alt1"]
    events = await events_of(server, top_logprobs=0, include=["message.output_text.logprobs"])
    told = [entry for event in events for entry in event.get("logprobs", []) if "delta" in event]
    assert [entry["token"] for entry in told] == ["Hello", " world"]


async def test_what_is_kept(server: Server, client: openai.AsyncOpenAI) -> None:
    reply = await client.responses.create(model=MODEL, input="Hi")
    found = await client.responses.retrieve(reply.id)
    strict(found)
    assert found == reply
    page = await client.responses.input_items.list(reply.id)
    (item,) = page.data
    strict(item)
    assert item.content[0].text == "Hi"
    with pytest.raises(openai.BadRequestError, match="background"):
        await client.responses.cancel(reply.id)
    await client.responses.delete(reply.id)
    for asking in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as caught:
            await asking(reply.id)
        assert caught.value.code == "response_not_found"
    unkept = await client.responses.create(model=MODEL, input="Hi", store=False)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model=MODEL, input="Hi", previous_response_id=unkept.id)
    assert caught.value.code == "previous_response_not_found"
    streams = await client.responses.create(model=MODEL, input="Hi", stream=True)
    last = [event async for event in streams][-1]
    assert (await client.responses.retrieve(last.response.id)).output_text == "Hello world"


async def test_pages_of_input_items(server: Server, client: openai.AsyncOpenAI) -> None:
    said = [{"role": "user", "content": str(n)} for n in range(5)]
    reply = await client.responses.create(model=MODEL, input=said)
    found = [item async for item in client.responses.input_items.list(reply.id, limit=2)]
    assert [item.content[0].text for item in found] == ["4", "3", "2", "1", "0"]
    first = await client.responses.input_items.list(reply.id, limit=2, order="asc")
    assert [item.content[0].text for item in first.data] == ["0", "1"] and first.has_more
    for query in ("limit=0", "limit=x", "order=up", "after=x"):
        url = f"{server.url}/v1/responses/{reply.id}/input_items?{query}"
        assert (await server.client.get(url)).status == 400


async def test_tokens_are_counted(server: Server, client: openai.AsyncOpenAI) -> None:
    counted = await client.responses.input_tokens.count(model=MODEL, input="Hi", tools=[WEATHER])
    assert counted.input_tokens == 2
    ((asked, _),) = server.gateway.codec_calls
    assert isinstance(asked, ChatPrompt) and asked.tools


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}


@pytest.mark.parametrize(
    ("members", "code", "param"),
    [
        ({"input": []}, "empty_array", "input"),
        ({"input": None}, "invalid_type", "input"),
        ({"input": [IMAGE]}, "unsupported_content_type", "input[0].content[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"type": "mcp_call"}]}, "unsupported_content_type", "input[0].type"),
        ({"input": [{"type": "function_call"}]}, "invalid_type", "input[0].call_id"),
        ({"input": [{"id": "msg_1"}]}, "response_not_found", "input[0].id"),
        ({"previous_response_id": "resp_1"}, "previous_response_not_found", "previous_response_id"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"conversation": "c"}, "unsupported_parameter", "conversation"),
        ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"max_output_tokens": 0}, "integer_below_min_value", "max_output_tokens"),
        ({"max_output_tokens": 500}, "context_length_exceeded", "max_output_tokens"),
        ({"max_output_tokens": "9"}, "invalid_type", "max_output_tokens"),
        ({"temperature": 3}, "decimal_above_max_value", "temperature"),
        ({"top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"text": {"format": {"type": "yaml"}}}, "invalid_value", "text.format"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "unsupported_parameter", "tool_choice"),
        ({"truncation": "often"}, "invalid_value", "truncation"),
        ({"metadata": {str(n): "" for n in range(17)}}, "array_above_max_length", "metadata"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)  # fmt: skip
async def test_refused(server: Server, members: dict[str, Any], code: str, param: str) -> None:
    message = await refused(server, code, param, **members)
    assert "max_completion_tokens" not in message and "messages" not in message


async def test_schemas_are_not_nested_for_ever(server: Server) -> None:
    """What is read has to be written again, by us and by those behind us."""
    tools = [{**WEATHER, "parameters": "@"}]
    form = {"type": "json_schema", "name": "n", "schema": "@"}
    for members in ({"tools": tools}, {"text": {"format": form}}):
        body = json.dumps({"model": MODEL, "input": "Hi", **members}).encode()
        for levels in (100, 130, 500, *range(970, 985)):
            schema = b'{"properties":' * levels + b"{}" + b"}" * levels
            for path in ("/v1/responses", "/v1/responses/input_tokens"):
                response = await server.post(path, body.replace(b'"@"', schema))
                assert response.status == (200 if levels == 100 else 400), (path, levels)


def text(kind: str, said: str) -> list[dict[str, str]]:
    return [{"type": kind, "text": said}]


async def test_what_agents_send_is_let_in(server: Server) -> None:
    """As Codex, OpenAI's Agents and the AI SDK."""
    await post(
        server,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "medium", "summary": "auto"},
        text={"verbosity": "low"},
        prompt_cache_key="k",
        service_tier="auto",
        truncation="auto",
        store=False,
        parallel_tool_calls=True,
        tool_choice="auto",
        stream_options={"include_obfuscation": False},
        input=[
            {"type": "message", "role": "developer", "content": text("input_text", "D")},
            {"type": "message", "role": "user", "content": text("input_text", "U")},
            {
                **{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
                "content": text("reasoning_text", "R"),
            },
            {
                **{"type": "message", "role": "assistant", "id": "m", "status": "completed"},
                "content": [{**text("output_text", "A")[0], "annotations": []}],
            },
            {"role": "user", "content": "V"},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": "W"},
        ],
    )  # fmt: skip
    assert prompt(server).messages == [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
        {"role": "user", "content": "V"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "W"},
    ]


async def test_a_refusal_before_the_first_event_is_a_status(server: Server) -> None:
    full = Problem(code=ErrorCode.QUEUE_FULL, message="messages[1] is full.", param="messages[1]")
    server.gateway.refuse(full)
    for stream in (False, True):
        body = {"model": MODEL, "input": "Hi", "instructions": "I", "stream": stream}
        response = await server.post("/v1/responses", body)
        assert response.status == 429 and response.headers["Retry-After"]
        assert (await response.json())["error"]["param"] == "input[0]"


async def test_a_failure_in_mid_stream_is_an_event(
    server: Server, client: openai.AsyncOpenAI
) -> None:
    late = Problem(code=ErrorCode.DEADLINE, message="Too late.")
    server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], Pause(0.01), late]
    last = (await events_of(server))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "Too late."}
    reply = await server.post("/v1/responses", {"model": MODEL, "input": "Hi"})
    assert reply.status == 504
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(last["response"]["id"])
