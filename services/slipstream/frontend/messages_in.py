"""Chat messages and prompts of a body, rebuilt from what is allowed in them.

Rebuilt, not checked and passed on: what the allow-list does not know goes no further.
"""

from typing import Any, TypeAlias

from slipstream.errors import ErrorCode
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.validate import Limits, at_most, not_empty, refuse, shown, token_id
from slipstream.messages import TextPrompt, TokenPrompt
from slipstream.types import pack_tokens

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_CALLS_MAX = 128
_TEMPLATE_NAMES = {"reasoning": "reasoning_content"}
"""Our answers have both."""


def chat_messages(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    not_empty("messages", messages, "send at least one message")
    at_most("messages", messages, limits.max_messages)
    plain = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _check_calls(plain)
    return plain


def prompt_end(
    messages: list[dict[str, Any]], continues: bool | None, generates: bool | None
) -> tuple[bool, bool]:
    """Whether the prompt ends inside of the last message, and whether with the beginning of an
    answer."""
    if continues and generates:
        refuse(
            "continue_final_message and add_generation_prompt exclude each other.",
            "continue_final_message",
        )
    if continues and messages[-1]["role"] != "assistant":
        refuse(
            "continue_final_message goes on with a message of role 'assistant', but the last one "
            f"is of role {shown(messages[-1]['role'])}.",
            "continue_final_message",
        )
    return bool(continues), not continues if generates is None else generates


def _check_calls(messages: list[dict[str, Any]]) -> None:
    """Calls are answered at once, and nothing else is."""
    unanswered: set[str] = set()
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if message["role"] == "tool":
            name = message["tool_call_id"]
            if name not in unanswered:
                refuse(f"{at} answers the call {shown(name)}, which waits for no answer.", at)
            unanswered.discard(name)
            continue
        if unanswered:
            missing = shown(min(unanswered))
            refuse(f"{at} comes before the call {missing} is answered by role 'tool'.", at)
        unanswered = {call["id"] for call in message.get("tool_calls", ())}
    if unanswered:
        missing = shown(min(unanswered))
        refuse(f"The call {missing} is not answered; add a message of role 'tool'.", "messages")


def _message(message: dict[str, Any], at: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        refuse(f"{at}.role must be one of {', '.join(ROLES)}, but is {shown(role)}.", f"{at}.role")
    plain: dict[str, Any] = {"role": role}
    tool_calls = message.get("tool_calls")
    if tool_calls is not None:
        plain["tool_calls"] = _tool_calls(tool_calls, role, f"{at}.tool_calls")
    optional = role == "assistant" and bool(tool_calls)
    plain["content"] = _content(message.get("content"), optional, f"{at}.content")
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if message.get(name) is not None:
            plain[_TEMPLATE_NAMES.get(name, name)] = _string(message[name], f"{at}.{name}")
    if role == "tool" and "tool_call_id" not in plain:
        refuse(
            f"A message of role 'tool' must say which call it answers: {at}.tool_call_id.",
            f"{at}.tool_call_id",
            ErrorCode.MISSING_PARAMETER,
        )
    return plain


def _string(value: Any, at: str) -> str:
    if not isinstance(value, str):
        refuse(f"{at} must be a string, but is {shown(value)}.", at, ErrorCode.INVALID_TYPE)
    return value


def _content(content: Any, optional: bool, at: str) -> str | None:
    """One text; parts are joined as they are, because they carry their own spaces."""
    if isinstance(content, str):
        return content
    if content in (None, []) and optional:
        return None
    if not isinstance(content, list):
        refuse(
            f"{at} must be a string or a list of text parts, but is {shown(content)}.",
            at,
            ErrorCode.INVALID_TYPE,
        )
    if not content:
        refuse(f"{at} is empty; send a string or text parts.", at)
    return "".join(_part(part, f"{at}[{i}]") for i, part in enumerate(content))


def _part(part: Any, at: str) -> str:
    if not isinstance(part, dict):
        refuse(f"{at} must be an object, but is {shown(part)}.", at, ErrorCode.INVALID_TYPE)
    if part.get("type") == "refusal":
        return _string(part.get("refusal"), f"{at}.refusal")
    if part.get("type") != "text":
        refuse(
            f"{at} is of type {shown(part.get('type'))}; this model reads parts of type 'text'.",
            at,
            ErrorCode.UNSUPPORTED_CONTENT,
        )
    return _string(part.get("text"), f"{at}.text")


def _tool_calls(calls: Any, role: str, at: str) -> list[dict[str, Any]]:
    if role != "assistant" or not isinstance(calls, list) or not 1 <= len(calls) <= TOOL_CALLS_MAX:
        refuse(
            f"{at} must be a list of 1 to {TOOL_CALLS_MAX} calls in a message of role 'assistant'.",
            at,
        )
    return [_tool_call(call, f"{at}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    match call:
        case {
            "id": str(call_id),
            "type": "function",
            "function": {"name": str(name), "arguments": str(arguments)},
        }:
            function = {"name": name, "arguments": arguments}
            return {"id": call_id, "type": "function", "function": function}
    refuse(
        f"{at} must have an id, the type 'function', and a function with name and arguments, "
        "all of them strings.",
        at,
        ErrorCode.INVALID_TYPE,
    )


Scalar: TypeAlias = str | int | float | bool | None


def template_args(arguments: dict[str, Any] | None) -> dict[str, Scalar]:
    """Which names the template knows is the tokenizer's to say."""
    at = "chat_template_kwargs"
    if arguments is None:
        return {}
    if len(arguments) > 32:
        refuse(f"{at} has {len(arguments)} members; at most 32 are allowed.", at)
    for name, value in arguments.items():
        if not isinstance(value, str | int | float | None) or (
            isinstance(value, int) and abs(value) >= 2**63
        ):
            refuse(
                f"{at}[{shown(name)}] must be a string, number, boolean or null, but is "
                f"{shown(value)}.",
                at,
                ErrorCode.INVALID_TYPE,
            )
    return arguments


def prompts(
    prompt: Any, add_special_tokens: bool, limits: Limits, status: ClusterStatus
) -> list[TextPrompt | TokenPrompt]:
    """The prompts of a completions body: text, texts, token ids, or several of these."""
    many: list[Any]
    match prompt:
        case str():
            many = [prompt]
        case [first, *_] if isinstance(first, str | list):
            many = prompt
        case [_, *_]:
            many = [prompt]
        case []:
            not_empty("prompt", prompt, "send some text")
            raise AssertionError  # it has refused
        case _:
            refuse(
                f"prompt must be a string, a list of strings, or token ids, but is "
                f"{shown(prompt)}.",
                "prompt",
                ErrorCode.INVALID_TYPE,
            )
    at_most("prompt", many, limits.max_prompts)
    return [_prompt(one, type(many[0]), add_special_tokens, status) for one in many]


def _prompt(
    prompt: Any, kind: type[Any], add_special_tokens: bool, status: ClusterStatus
) -> TextPrompt | TokenPrompt:
    if type(prompt) is not kind:
        refuse(
            f"prompt must be all text or all token ids; {shown(prompt)} is of another kind.",
            "prompt",
            ErrorCode.INVALID_TYPE,
        )
    if not prompt:
        refuse("prompt is empty; send some text.", "prompt")
    if isinstance(prompt, str):
        return TextPrompt(text=prompt, add_special_tokens=add_special_tokens)
    if len(prompt) >= (status.max_model_len or 2**31):
        refuse(
            f"This model's maximum context length is {status.max_model_len} tokens, but the prompt "
            f"has {len(prompt)}. Please shorten it.",
            "prompt",
            ErrorCode.CONTEXT_LENGTH,
        )
    return TokenPrompt(tokens=token_ids(prompt, "prompt", status))


def token_ids(ids: list[Any], name: str, status: ClusterStatus) -> bytes:
    for one in ids:
        if type(one) is not int:
            refuse(f"{name} has {shown(one)} where a token id must be.", name)
    token_id(name, min(ids), status.vocab_size)
    token_id(name, max(ids), status.vocab_size)
    return pack_tokens(ids)
