"""Items, tools and formats of the Responses API in the words of a chat."""

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from slipstream.errors import ErrorCode
from slipstream.frontend.inner_chat import Conversation
from slipstream.frontend.responses_shapes import InputTokensRequest, ResponsesRequest
from slipstream.frontend.responses_store import ResponseStore
from slipstream.frontend.validate import at_most, not_empty, refuse, shown
from slipstream.messages import PartKind

ITEMS_MAX = 10_000
TEXT_PARTS = ("input_text", "output_text", "text")
NAMES = {
    r"messages": "input",
    r"max_tokens": "max_output_tokens",
    r"max_completion_tokens": "max_output_tokens",
    r"response_format\.json_schema": "text.format",
    r"(response_format|structured_outputs)": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"tool_choice\.function": "tool_choice",
}
"""Our fields in a chat -> theirs."""


async def read_input(
    given: str | list[dict[str, Any]], into: Conversation, store: ResponseStore
) -> list[dict[str, Any]]:
    """The items, those that were references as what they refer to."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": given}]
    not_empty("input", given, "send at least one item")
    at_most("input", given, ITEMS_MAX)
    items = []
    for i, item in enumerate(given):
        at = f"input[{i}]"
        kind = item.get("type", "message" if "role" in item else "item_reference")
        if kind == "item_reference":
            item = await _referred(item, at, store)
            kind = item["type"]
        _read(kind, item, at, into)
        items.append(item)
    return items


def _read(kind: Any, item: dict[str, Any], at: str, into: Conversation) -> None:
    match kind:
        case "message":
            into.say(_role(item, at), _text(item.get("content"), f"{at}.content"), at)
        case "function_call":
            call_id = _string(item.get("call_id"), f"{at}.call_id")
            name = _string(item.get("name"), f"{at}.name")
            into.call(call_id, name, _string(item.get("arguments"), f"{at}.arguments"), at)
        case "function_call_output":
            call_id = _string(item.get("call_id"), f"{at}.call_id")
            into.result(call_id, _text(item.get("output"), f"{at}.output"), at)
        case "reasoning":
            into.think(_thoughts(item, at))
        case _:
            refuse(
                f"{at} is of type {shown(kind)}; served are message, function_call, "
                "function_call_output, reasoning and item_reference.",
                f"{at}.type",
                ErrorCode.UNSUPPORTED_CONTENT,
            )


def _role(item: dict[str, Any], at: str) -> str:
    role = item.get("role")
    if role in ("user", "assistant", "system", "developer"):
        return str(role)
    refuse(
        f"{at}.role must be user, assistant, system or developer, but is {shown(role)}.",
        f"{at}.role",
    )


def _text(content: Any, at: str) -> str:
    """One text; parts are joined as they are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(
            f"{at} must be a string or a list of text parts, but is {shown(content)}.",
            at,
            ErrorCode.INVALID_TYPE,
        )
    return "".join(_part(part, f"{at}[{i}]") for i, part in enumerate(content))


def _part(part: Any, at: str) -> str:
    match part:
        case {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": kind, "text": str(text)} if kind in TEXT_PARTS:
            return text
        case {"type": kind} if kind in TEXT_PARTS:
            refuse(f"{at}.text must be a string.", f"{at}.text", ErrorCode.INVALID_TYPE)
        case {"type": kind}:
            refuse(
                f"{at} is of type {shown(kind)}; this model reads parts of type 'input_text'.",
                at,
                ErrorCode.UNSUPPORTED_CONTENT,
            )
    refuse(f"{at} must be an object with a type, but is {shown(part)}.", at, ErrorCode.INVALID_TYPE)


def _string(value: Any, at: str) -> str:
    if isinstance(value, str):
        return value
    refuse(f"{at} must be a string, but is {shown(value)}.", at, ErrorCode.INVALID_TYPE)


def _thoughts(item: dict[str, Any], at: str) -> str:
    """What the model thought; a summary says less, and what is encrypted nothing."""
    parts = item.get("content") or item.get("summary") or []
    match parts:
        case [*_] if all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
            return "".join(part["text"] for part in parts)
    refuse(f"{at}.content must be a list of texts.", f"{at}.content", ErrorCode.INVALID_TYPE)


_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_i?\d+")


async def _referred(item: dict[str, Any], at: str, store: ResponseStore) -> dict[str, Any]:
    item_id = item.get("id")
    named = _ITEM_ID.fullmatch(item_id) if isinstance(item_id, str) else None
    entry = await store.find(f"resp_{named[1]}") if named else None
    if entry is not None:
        output = msgspec.json.decode(entry.response)["output"]
        for one in [*output, *msgspec.json.decode(entry.input_items)]:
            if one["id"] == item_id:
                return dict(one)
    refuse(
        f"{at} refers to {shown(item_id)}, which is not kept. {store.limits()}; send the item.",
        f"{at}.id",
        ErrorCode.RESPONSE_NOT_FOUND,
    )


def with_ids(items: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """As `GET …/input_items` shows them. `name`: hex digits of the response."""
    shown_items = []
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        prefix = {"message": "msg", "reasoning": "rs"}.get(kind, "fc")
        one = {"id": f"{prefix}_{name}_i{i}", "type": kind, "status": "completed", **item}
        if isinstance(one.get("content"), str):
            part = "output_text" if one.get("role") == "assistant" else "input_text"
            one["content"] = [{"type": part, "text": one["content"]}]
        shown_items.append(one)
    return shown_items


# --- Tools and formats ----------------------------------------------------------------------------


class Tools(msgspec.Struct, kw_only=True):
    served: list[dict[str, Any]] = []
    """As the client sent them."""
    skipped: list[str] = []
    choice: Any = None
    """As a chat has it."""

    @property
    def functions(self) -> list[dict[str, Any]] | None:
        return [_function(tool) for tool in self.served] or None


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    members = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in members if tool.get(name) is not None}
    return {"type": "function", "function": function}


def read_tools(body: ResponsesRequest | InputTokensRequest) -> Tools:
    """Functions are served. Tools of other kinds are skipped, because agents always send some; an
    answer that has to use one is refused."""
    tools = Tools()
    for i, tool in enumerate(body.tools or []):
        if tool.get("type") == "function":
            tools.served.append(tool)
        else:
            tools.skipped.append(f"tools[{i}]={shown(tool.get('type'))}")
    match body.tool_choice:
        case None | "auto" | "none":
            tools.choice = body.tool_choice if tools.served else None
        case "required":
            tools.choice = "required"
        case {"type": "function", "name": str(name)}:
            tools.choice = {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*allowed]}:
            names = {one.get("name") for one in allowed if isinstance(one, dict)}
            tools.served = [tool for tool in tools.served if tool.get("name") in names]
            tools.choice = mode if tools.served or mode == "required" else None
        case {"type": str(kind)} if kind not in ("function", "allowed_tools"):
            _hosted(kind)
        case other:
            refuse(
                "tool_choice must be auto, none, required, a function or allowed_tools, but is "
                f"{shown(other)}.",
                "tool_choice",
            )
    forced = tools.choice not in (None, "auto", "none")
    if forced and not tools.served:
        refuse(
            "tool_choice asks for a call, but tools has no function that is served; send one.",
            "tool_choice",
        )
    return tools


def _hosted(kind: str) -> NoReturn:
    refuse(
        f"tool_choice asks for a tool of type {shown(kind)}; only functions are served.",
        "tool_choice",
        ErrorCode.UNSUPPORTED_PARAMETER,
    )


def response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """`text.format` as a chat's `response_format`."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "json_object"}
        case {"type": "json_schema"}:
            members = ("name", "description", "schema", "strict")
            named = {name: given[name] for name in members if given.get(name) is not None}
            return {"type": "json_schema", "json_schema": named}
    refuse(
        f"text.format must be of type text, json_object or json_schema, but is {shown(given)}.",
        "text.format",
    )


def remember(conversation: Conversation, output: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation with the answer's blocks."""
    for block in output:
        match block.kind:
            case PartKind.REASONING:
                conversation.think(block.text)
            case PartKind.CONTENT:
                conversation.say("assistant", block.text, "output")
            case PartKind.CALL:
                conversation.call(block.call_id, block.name, block.text, "output")
    return conversation.messages
