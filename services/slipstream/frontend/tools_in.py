"""Tools of a body, rebuilt from what is allowed in them, and which of them must be called."""

import re
from typing import Any, NamedTuple

from slipstream.errors import ErrorCode
from slipstream.frontend.validate import at_most, check_depth, not_empty, refuse, shown

TOOLS_MAX = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Tool = dict[str, Any]


class Tools(NamedTuple):
    """As `ChatPrompt` has them."""

    tools: list[Tool] | None
    choice: str
    """auto, none, required, or with `=` before it a function's name."""


def tools_of(tools: list[Tool] | None, choice: Any) -> Tools:
    if tools is None:
        if choice in (None, "none"):
            return Tools(None, "auto")
        refuse("tool_choice has a meaning only with tools.", "tool_choice")
    not_empty("tools", tools, "leave it out")
    check_depth("tools", tools)
    at_most("tools", tools, TOOLS_MAX)
    known = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in known]
    for index, name in enumerate(names):
        if name in names[:index]:
            refuse(f"tools has two functions {shown(name)}.", f"tools[{index}].function.name")
    allowed, word = _choice(choice, names)
    return Tools([tool for tool in known if tool["function"]["name"] in allowed], word)


def _tool(tool: Tool, at: str) -> Tool:
    if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        refuse(
            f"{at} must be of type 'function' and have a function, but is {shown(tool)}.",
            f"{at}.type" if tool.get("type") != "function" else f"{at}.function",
        )
    given = tool["function"]
    function: dict[str, Any] = {"name": _name(given.get("name"), f"{at}.function.name")}
    for member, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        value = given.get(member)
        if value is None:
            continue
        if not isinstance(value, kind):
            refuse(
                f"{at}.function.{member} must be of type {_WORDS[kind]}, but is {shown(value)}.",
                f"{at}.function.{member}",
                ErrorCode.INVALID_TYPE,
            )
        function[member] = value
    return {"type": "function", "function": function}


_WORDS = {str: "string", dict: "object", bool: "boolean"}


def _name(name: Any, at: str) -> str:
    if not isinstance(name, str):
        code = ErrorCode.MISSING_PARAMETER if name is None else ErrorCode.INVALID_TYPE
        refuse(f"{at} must be a string, but is {shown(name)}.", at, code)
    if not _NAME.fullmatch(name):
        refuse(f"{at} must be 1 to 64 letters, digits, '_' or '-', but is {shown(name)}.", at)
    return name


def _choice(choice: Any, names: list[str]) -> tuple[list[str], str]:
    """The functions that may be called, and the word for the tokenizer."""
    match choice:
        case None:
            return names, "auto"
        case "none" | "auto" | "required":
            return names, choice
        case {"type": "function", "function": {"name": str(name)}}:
            return names, f"={_known(name, names, 'tool_choice.function.name')}"
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [_, *_] as some},
        }:
            at = "tool_choice.allowed_tools.tools"
            return [_known(_allowed(tool, at), names, at) for tool in some], mode
    refuse(
        "tool_choice must be 'none', 'auto', 'required', or an object that names a function or "
        f"allowed tools, but is {shown(choice)}.",
        "tool_choice",
    )


def _allowed(tool: Any, at: str) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    refuse(f"{at} must name functions, but has {shown(tool)}.", at)


def _known(name: str, names: list[str], at: str) -> str:
    if name not in names:
        refuse(f"{at} is {shown(name)}, which is none of the tools.", at)
    return name
