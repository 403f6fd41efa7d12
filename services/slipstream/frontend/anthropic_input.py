"""Messages, blocks and tools of Anthropic's API in the words of a chat."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from slipstream.errors import ErrorCode
from slipstream.frontend.anthropic_shapes import (
    NEUTRAL_MESSAGES,
    CountTokensRequest,
    MessagesRequest,
    UnservedMessages,
)
from slipstream.frontend.inner_chat import BETWEEN, Conversation, check_unserved
from slipstream.frontend.openai import PASSED_ELSEWHERE
from slipstream.frontend.validate import (
    at_most,
    check_depth,
    not_empty,
    number,
    refuse,
    shown,
)

NAMES = {
    r"max_completion_tokens": "max_tokens",
    r"^stop": "stop_sequences",
    r"response_format\.json_schema": "output_config.format",
    r"(response_format|structured_outputs)": "output_config.format",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    r"tool_choice\.function": "tool_choice",
}
"""Our fields in a chat -> theirs. `stop` is a word too, but never the first of a sentence."""

MESSAGES_MAX = 10_000

Request = MessagesRequest | CountTokensRequest


class Asked(msgspec.Struct, kw_only=True):
    fields: dict[str, Any]
    """Of the chat."""
    origins: list[str]
    skipped: list[str]
    """Tools that are no functions."""


def read(body: Request) -> Asked:
    check_unserved(body, UnservedMessages, NEUTRAL_MESSAGES)
    conversation = Conversation(joins=True)
    if body.system is not None:
        conversation.say("system", _texts(body.system, "system"), "system")
    not_empty("messages", body.messages, "send at least one message")
    at_most("messages", body.messages, MESSAGES_MAX)
    for i, message in enumerate(body.messages):
        _message(message, f"messages[{i}]", conversation)
    fields, skipped = _tools(body)
    fields |= {"model": body.model, "messages": conversation.messages}
    fields["chat_template_kwargs"] = body.chat_template_kwargs
    fields["response_format"] = _format(body.output_config.format if body.output_config else None)
    last = conversation.messages[-1]
    if last["role"] == "assistant" and "tool_calls" not in last:  # the beginning of the answer
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return Asked(fields=fields, origins=conversation.origins, skipped=skipped)


def sampling_fields(body: MessagesRequest) -> dict[str, Any]:
    if body.temperature is not None:
        number("temperature", body.temperature, 0, 1)
    return {
        **{name: getattr(body, name) for name in PASSED_ELSEWHERE},
        "max_completion_tokens": body.max_tokens,
        "stop": body.stop_sequences or None,
    }


# --- Messages -------------------------------------------------------------------------------------


def _message(message: dict[str, Any], at: str, into: Conversation) -> None:
    role, content = message.get("role"), message.get("content")
    if role == "system":
        into.say("system", _texts(content, f"{at}.content"), at)
    elif role not in ("user", "assistant"):
        refuse(f"{at}.role must be user or assistant, but is {shown(role)}.", f"{at}.role")
    elif isinstance(content, str):
        into.say(role, content, at)
    else:
        blocks = list(_blocks(content, f"{at}.content"))
        (_of_user if role == "user" else _of_assistant)(blocks, at, into)


def _of_user(blocks: list[tuple[str, dict[str, Any]]], at: str, into: Conversation) -> None:
    """Results become messages of their own, first, because calls are answered at once; the texts
    become one message."""
    texts: list[str] = []
    for where, block in blocks:
        match block:
            case {"type": "text"}:
                texts.append(_string(block.get("text"), f"{where}.text"))
            case {"type": "tool_result"}:
                call_id = _string(block.get("tool_use_id"), f"{where}.tool_use_id")
                into.result(call_id, _texts(block.get("content", ""), f"{where}.content"), at)
            case _:
                _foreign(block, where, "text and tool_result")
    if texts or not blocks:
        into.say("user", BETWEEN.join(texts), at)


def _of_assistant(blocks: list[tuple[str, dict[str, Any]]], at: str, into: Conversation) -> None:
    texts: list[str] = []
    calls: list[tuple[str, str, str]] = []
    for where, block in blocks:
        match block:
            case {"type": "text"}:
                texts.append(_string(block.get("text"), f"{where}.text"))
            case {"type": "thinking"}:
                into.think(_string(block.get("thinking"), f"{where}.thinking"))
            case {"type": "redacted_thinking"}:
                pass  # nobody can read it
            case {"type": "tool_use"}:
                calls.append(_call(block, where))
            case _:
                _foreign(block, where, "text, thinking and tool_use")
    if texts or not calls:
        into.say("assistant", BETWEEN.join(texts), at)
    for call in calls:
        into.call(*call, at)


def _call(block: dict[str, Any], at: str) -> tuple[str, str, str]:
    given = block.get("input")
    if not isinstance(given, dict):
        refuse(
            f"{at}.input must be an object, but is {shown(given)}.",
            f"{at}.input",
            ErrorCode.INVALID_TYPE,
        )
    check_depth(f"{at}.input", given)
    call_id = _string(block.get("id"), f"{at}.id")
    return call_id, _string(block.get("name"), f"{at}.name"), msgspec.json.encode(given).decode()


def _blocks(content: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(content, list):
        refuse(
            f"{at} must be a string or a list of blocks, but is {shown(content)}.",
            at,
            ErrorCode.INVALID_TYPE,
        )
    for i, block in enumerate(content):
        where = f"{at}[{i}]"
        if not isinstance(block, dict):
            refuse(
                f"{where} must be an object, but is {shown(block)}.", where, ErrorCode.INVALID_TYPE
            )
        yield where, block


def _texts(content: Any, at: str) -> str:
    """One text of a string or of blocks of text."""
    if isinstance(content, str):
        return content
    texts = []
    for where, block in _blocks(content, at):
        if block.get("type") != "text":
            _foreign(block, where, "text")
        texts.append(_string(block.get("text"), f"{where}.text"))
    return BETWEEN.join(texts)


def _foreign(block: Mapping[str, Any], at: str, served: str) -> None:
    refuse(
        f"{at} is of type {shown(block.get('type'))}; served here are blocks of type {served}.",
        at,
        ErrorCode.UNSUPPORTED_CONTENT,
    )


def _string(value: Any, at: str) -> str:
    if isinstance(value, str):
        return value
    refuse(f"{at} must be a string, but is {shown(value)}.", at, ErrorCode.INVALID_TYPE)


# --- Tools and formats ----------------------------------------------------------------------------


def _tools(body: Request) -> tuple[dict[str, Any], list[str]]:
    """The chat's fields of tools; tools of other kinds, which are skipped."""
    served, skipped = [], []
    for i, tool in enumerate(body.tools or []):
        if tool.get("type") in (None, "custom"):
            served.append(_function(tool, f"tools[{i}]"))
        else:
            skipped.append(f"tools[{i}]={shown(tool['type'])}")
    choice = _choice(body.tool_choice)
    if choice not in (None, "auto", "none") and not served:
        refuse(
            "tool_choice asks for a call, but tools has none that is served; send one with a name "
            "and an input_schema.",
            "tool_choice",
        )
    if not served:
        return {}, skipped
    alone = (body.tool_choice or {}).get("disable_parallel_tool_use")
    parallel = False if alone is True else None
    return {"tools": served, "tool_choice": choice, "parallel_tool_calls": parallel}, skipped


def _function(tool: dict[str, Any], at: str) -> dict[str, Any]:
    function = {"name": _string(tool.get("name"), f"{at}.name")}
    if "input_schema" not in tool:
        refuse(
            f"You must provide the parameter '{at}.input_schema'.",
            f"{at}.input_schema",
            ErrorCode.MISSING_PARAMETER,
        )
    function["parameters"] = tool["input_schema"]
    function |= {name: tool[name] for name in ("description", "strict") if name in tool}
    return {"type": "function", "function": function}


def _choice(given: dict[str, Any] | None) -> Any:
    match given:
        case None:
            return None
        case {"type": "auto" | "none" as kind}:
            return kind
        case {"type": "any"}:
            return "required"
        case {"type": "tool", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    refuse(
        f"tool_choice must be of type auto, any, none, or tool with a name, but is {shown(given)}.",
        "tool_choice",
    )


def _format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    match given:
        case None:
            return None
        case {"type": "json_schema", "schema": schema}:
            named = {"name": "answer", "schema": schema, "strict": True}
            return {"type": "json_schema", "json_schema": named}
    refuse(
        "output_config.format must be of type json_schema and have a schema, but is "
        f"{shown(given)}.",
        "output_config.format",
    )
