"""Tools and formats of the Responses API in the words of a chat."""

from typing import Any, NoReturn

import msgspec

from slipstream.errors import ErrorCode
from slipstream.frontend.responses_shapes import InputTokensRequest, ResponsesRequest
from slipstream.frontend.validate import refuse, shown


class Tools(msgspec.Struct, kw_only=True):
    served: list[dict[str, Any]] = []
    """As the client sent them."""
    skipped: list[str] = []
    choice: Any = None
    """As a chat has it."""
    choice_out: Any = None
    """As the response repeats it."""

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
            _name(tool, f"tools[{i}].name")
            tools.served.append(tool)
        else:
            tools.skipped.append(f"tools[{i}]={shown(tool.get('type'))}")
    tools.choice_out = body.tool_choice
    match body.tool_choice:
        case None | "auto" | "none":
            tools.choice = body.tool_choice if tools.served else None
        case "required":
            tools.choice = "required"
        case {"type": "function", "name": str(name)}:
            tools.choice = {"type": "function", "function": {"name": name}}
            tools.choice_out = {"type": "function", "name": name}
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*allowed]}:
            names = _allowed(allowed, {tool["name"] for tool in tools.served})
            tools.served = [tool for tool in tools.served if tool["name"] in names]
            tools.choice = mode if tools.served or mode == "required" else None
            some = [{"type": "function", "name": name} for name in names]
            tools.choice_out = {"type": "allowed_tools", "mode": mode, "tools": some}
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


def _name(tool: dict[str, Any], at: str) -> str:
    name = tool.get("name")
    if isinstance(name, str):
        return name
    code = ErrorCode.MISSING_PARAMETER if name is None else ErrorCode.INVALID_TYPE
    refuse(f"{at} must be a string, but is {shown(name)}.", at, code)


def _allowed(given: list[Any], served: set[str]) -> dict[str, None]:
    """The functions that it names, each once; those of other kinds are skipped."""
    names: dict[str, None] = {}
    for i, one in enumerate(given):
        at = f"tool_choice.tools[{i}]"
        if not isinstance(one, dict) or not isinstance(one.get("type"), str):
            refuse(f"{at} must be an object with a type, but is {shown(one)}.", at)
        if one["type"] == "function":
            name = _name(one, f"{at}.name")
            if name not in served:
                refuse(f"{at}.name is {shown(name)}, which is none of the tools.", f"{at}.name")
            names[name] = None
    return names


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


def format_out(chats: dict[str, Any] | None) -> dict[str, Any]:
    """A chat's `response_format` as `text.format`."""
    match chats:
        case None:
            return {"type": "text"}
        case {"type": "json_schema", "json_schema": named}:
            return {"type": "json_schema", **named}
    return chats
