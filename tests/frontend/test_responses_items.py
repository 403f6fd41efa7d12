"""Items of /v1/responses: rebuilt from what is known, referred to within bounds; names and limits
that are none."""

import json
from typing import Any

import msgspec
import pytest

from frontend.fakes import MODEL, Pause, Server, answer, call, parted, speak, think
from frontend.test_responses import WEATHER, events_of, post, prompt, refused
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.problems import ApiError
from slipstream.frontend.responses_input import References
from slipstream.frontend.responses_store import Kept, MemoryStore

DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
JUNK = {"x": DEEP}
RESPONSE = "0" * 32


async def input_items(server: Server, response_id: str, query: str = "") -> list[dict[str, Any]]:
    url = f"{server.url}/v1/responses/{response_id}/input_items?order=asc{query}"
    response = await server.client.get(url)
    assert response.status == 200
    return list((await response.json())["data"])


async def test_items_are_kept_as_far_as_they_are_known(server: Server) -> None:
    annotated = {"type": "output_text", "text": "A", "annotations": [JUNK], **JUNK}
    refusal = {"type": "refusal", "refusal": "No.", **JUNK}
    given = [
        {"role": "user", "content": [{"type": "text", "text": "U", **JUNK}], "status": DEEP},
        {"type": "reasoning", "summary": [JUNK | {"text": "S"}], "encrypted_content": DEEP},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", **JUNK},
        {"type": "function_call_output", "call_id": "c", "output": [annotated]},
        {"role": "assistant", "content": [annotated, refusal], "status": "incomplete", **JUNK},
    ]
    made = await post(server, input=given)
    name, done = made["id"].removeprefix("resp_"), {"status": "completed"}
    said = {"type": "output_text", "text": "A", "annotations": []}
    whole = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "U"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "S"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "A"},
        {"type": "message", "role": "assistant", "content": [said, {"type": "refusal",
         "refusal": "No."}], "status": "incomplete"},
    ]  # fmt: skip
    prefixes = ("msg", "rs", "fc", "fc", "msg")
    assert await input_items(server, made["id"]) == [
        done | item | {"id": f"{prefix}_{name}_i{i}"}
        for i, (prefix, item) in enumerate(zip(prefixes, whole, strict=True))
    ]


async def test_what_is_repeated_is_known(server: Server) -> None:
    """In a stream it is written before the first token, where nothing can be refused any more."""
    named = {"type": "function", "name": "weather"}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    for choice in (named, allowed):
        given = {
            "tools": [WEATHER | JUNK],
            "tool_choice": choice | JUNK,
            "text": {"format": {"type": "text"} | JUNK},
        }
        assert (await events_of(server, **given))[-1]["type"] == "response.completed"
        made = await post(server, **given)
        assert made["tool_choice"] == choice and made["tools"] == [WEATHER]
        assert made["text"]["format"] == {"type": "text"}
    server.gateway.streams.clear()
    message = await refused(
        server, "invalid_value", "chat_template_kwargs", chat_template_kwargs=JUNK
    )
    assert "nested deeper" in message


async def test_ids_of_clients(server: Server) -> None:
    ids = [5, None, "", "x" * 65, "mine"]
    made = await post(server, input=[{"id": one, "role": "user", "content": "U"} for one in ids])
    name = made["id"].removeprefix("resp_")
    own = [f"msg_{name}_i{i}" for i in range(4)]
    assert [item["id"] for item in await input_items(server, made["id"])] == [*own, "mine"]
    after = await input_items(server, made["id"], f"&after={own[3]}")
    assert [item["id"] for item in after] == ["mine"]


@pytest.mark.parametrize("limit", ["0", "101", "00000000019999", "1" * 5000, "-1", "٣", "1\n"])
async def test_limits_that_are_none(server: Server, limit: str) -> None:
    made = await post(server)
    url = f"{server.url}/v1/responses/{made['id']}/input_items"
    response = await server.client.get(url, params={"limit": limit})
    assert response.status == 400
    assert (await response.json())["error"]["param"] == "limit"


# --- References -----------------------------------------------------------------------------------


class Counting(MemoryStore):
    found = 0

    async def find(self, response_id: str) -> Kept | None:
        self.found += 1
        return await super().find(response_id)


def item(index: int, text: str, mark: str = "") -> dict[str, Any]:
    content = [{"type": "output_text", "text": text}]
    return {"type": "message", "id": f"msg_{RESPONSE}_{mark}{index}", "content": content}


async def store_of(text: str) -> Counting:
    encode = msgspec.json.encode
    body = {"output": [item(0, "no"), item(1, text)]}
    entry = Kept(encode(body), encode([item(0, text, "i")]), b"[]")
    store = Counting(2**20, 60.0)
    await store.keep(f"resp_{RESPONSE}", entry)
    return store


async def test_what_is_kept_is_read_once() -> None:
    store = await store_of("A")
    references = References(store, 10_000)
    found = [await references.find(f"msg_{RESPONSE}_1", "") for _ in range(9)]
    assert found[0] == item(1, "A") and all(one is found[0] for one in found)
    assert await references.find(f"msg_{RESPONSE}_i0", "") == item(0, "A", "i")
    assert store.found == 2, "one list of the output, one of the input"


@pytest.mark.parametrize(
    "item_id",
    [f"msg_{RESPONSE}_2", f"msg_{RESPONSE}_i1", f"rs_{RESPONSE}_1", "msg_1", f"msg_{'1' * 32}_0",
     f"msg_{RESPONSE}_٣", f"msg_{RESPONSE}_{'9' * 5000}", 5, None, DEEP],
)  # fmt: skip
async def test_references_to_nothing(item_id: Any) -> None:
    with pytest.raises(ApiError) as caught:
        await References(await store_of("A"), 10_000).find(item_id, "input[0]")
    assert caught.value.problem.code is ErrorCode.RESPONSE_NOT_FOUND
    assert caught.value.problem.param == "input[0].id"


async def test_references_have_bounds() -> None:
    references = References(await store_of("A" * 400), 1500)
    await references.find(f"msg_{RESPONSE}_1", "input[0]")
    await references.find(f"msg_{RESPONSE}_i0", "input[1]")
    with pytest.raises(ApiError) as caught:
        await references.find(f"msg_{RESPONSE}_1", "input[2]")
    assert caught.value.problem.code is ErrorCode.TOO_LARGE


async def test_a_small_body_cannot_become_a_large_prompt(server: Server) -> None:
    made = await post(server, input="A" * 50_000)
    name = made["id"].removeprefix("resp_")
    reference = {"type": "item_reference", "id": f"msg_{name}_i0"}
    await post(server, input=[reference])
    assert prompt(server).messages == [{"role": "user", "content": "A" * 50_000}]
    body = {"model": MODEL, "input": [reference] * 20}
    response = await server.post("/v1/responses", body)
    assert response.status == 413 and len(server.gateway.streams) == 2
    assert (await response.json())["error"]["param"] == "input[1].id"


# --- Names ----------------------------------------------------------------------------------------


def allowing(*tools: Any) -> dict[str, Any]:
    return {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": list(tools)}}


@pytest.mark.parametrize(
    ("members", "code", "param"),
    [
        ({"tools": [{"type": "function", "name": {}}]}, "invalid_type", "tools[0].name"),
        ({"tools": [{"type": "x"}, {"type": "function"}]}, "missing_required_parameter",
         "tools[1].name"),
        (allowing({"type": "function", "name": []}), "invalid_type", "tool_choice.tools[0].name"),
        (allowing({"type": "function", "name": "zzz"}), "invalid_value",
         "tool_choice.tools[0].name"),
        (allowing({"type": "x"}, 5), "invalid_value", "tool_choice.tools[1]"),
        (allowing({"type": {}}), "invalid_value", "tool_choice.tools[0]"),
    ],
)  # fmt: skip
async def test_names_that_are_none(
    server: Server, members: dict[str, Any], code: str, param: str
) -> None:
    await refused(server, code, param, **{"tools": [WEATHER], **members})


async def test_tools_of_other_kinds_may_be_allowed(server: Server) -> None:
    await post(server, tools=[WEATHER, {"type": "web_search"}], **allowing({"type": "web_search"}))
    assert prompt(server).tools is None


# --- Instructions, failures -----------------------------------------------------------------------


async def test_instructions_are_one_message(server: Server) -> None:
    given = [
        {"role": "developer", "content": "D"},
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "developer", "content": "E"},
    ]
    await post(server, instructions="I", input=given)
    first = {"role": "system", "content": "I\n\nD\n\nS"}
    assert prompt(server).messages == [first, *given[2:]]
    server.gateway.refuse(Problem(code=ErrorCode.INVALID_VALUE, message="No.", param="messages[1]"))
    body = {"model": MODEL, "instructions": "I", "input": given}
    response = await server.post("/v1/responses", body)
    assert (await response.json())["error"]["param"] == "input[2]"


async def test_calls_of_an_answer_are_one_message(server: Server) -> None:
    """Whatever the model thought and said between them: they are answered together."""
    steps = [think("A"), *call("weather", "{}"), think("B"), speak("C"), speak("D"),
             *call("weather", "{}"), speak("E"), think("F")]  # fmt: skip
    server.gateway.script = lambda s: parted(s, steps)
    made = await post(server, tools=[WEATHER])
    names = [one["call_id"] for one in made["output"] if one["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": n, "output": n} for n in names]
    for earlier in (
        {"previous_response_id": made["id"], "input": results},
        {"input": [{"role": "user", "content": "Hi"}, *made["output"], *results]},
    ):
        await post(server, **earlier)
        asked, told, *answers = prompt(server).messages
        assert asked["content"] == "Hi" and [one["content"] for one in answers] == names
        assert (told["content"], told["reasoning_content"]) == ("CD\n\nE", "AB")
        assert [one["id"] for one in told["tool_calls"]] == names


async def test_what_was_said_before_a_failure_is_in_the_output(server: Server) -> None:
    late = Problem(code=ErrorCode.DEADLINE, message="Too late.")
    steps = ([think("T")], [speak("a")], call("weather", "{}")[:2], [])
    server.gateway.script = lambda s: [*parted(s, *steps)[:-1], Pause(0.01), late]
    events = await events_of(server, tools=[WEATHER])
    done, failed = events[-2:]
    assert (done["type"], failed["type"]) == ("response.output_item.done", "response.failed")
    thought, said, called = failed["response"]["output"]
    assert thought["content"][0]["text"] == "T" and said["content"][0]["text"] == "a"
    assert done["item"] == called and called["arguments"] == "{"
    assert [one["status"] for one in (thought, said, called)] == ["completed"] * 2 + ["incomplete"]
    server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], Pause(0.01), late]
    output = (await events_of(server))[-1]["response"]["output"]
    assert json.dumps(output).count('"a"') == 1 and output[0]["status"] == "incomplete"
