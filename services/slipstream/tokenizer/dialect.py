"""How a model writes calls and reasoning: read off its chat template, or said by a setting."""

import hashlib
import json
from collections.abc import Collection
from typing import Any, NamedTuple

import msgspec

from slipstream.errors import ErrorCode
from slipstream.messages import ChatPrompt
from slipstream.tokenizer.chat import ChatTemplate, refuse
from slipstream.tokenizer.formats import think
from slipstream.tokenizer.formats.hermes import CLOSE, OPEN
from slipstream.tokenizer.formats.tool_formats import FORMATS, ToolFormat

AUTO, NONE = "auto", "none"
_MISTRAL_ID_CHARS = 9


class DialectError(ValueError):
    """The settings ask for what the chat template cannot do; one line."""


class Dialect(NamedTuple):
    tools: ToolFormat | None
    native: bool
    """The chat template writes tools, calls and results. If not, a system message tells of the
    tools, and calls and results are text in messages."""
    thinks: bool

    def __str__(self) -> str:
        if self.tools is None:
            tools = "none"
        else:
            how = "by its chat template" if self.native else "told in a system message"
            tools = f"{self.tools.name}, {how}"
        return f"tools: {tools}; reasoning: {'think' if self.thinks else 'none'}"

    def adapted(
        self, prompt: ChatPrompt, messages: list[dict[str, Any]]
    ) -> tuple[ChatPrompt, list[dict[str, Any]]]:
        """What the template is given. PromptError: tools, and there is no way to write them."""
        tools = prompt.tools if prompt.tool_choice != NONE else None
        if tools and self.tools is None:
            refuse(
                ErrorCode.UNSUPPORTED_PARAMETER,
                "This server was started without tools (--tool-format none); send none.",
                "tools",
            )
        if not self.native:
            return msgspec.structs.replace(prompt, tools=None), _as_text(messages, tools)
        if self.tools is not None and self.tools.name.startswith("mistral"):
            messages = [_with_short_ids(message) for message in messages]
        return msgspec.structs.replace(prompt, tools=tools or None), messages


def detect(templates: Collection[ChatTemplate], tools: str, reasoning: str) -> Dialect:
    """By the settings --tool-format and --reasoning-format. DialectError."""
    source = "\n".join(template.source for template in templates)
    reads_tools = any(template.reads_tools for template in templates)
    found = _format(source) if reads_tools else None
    thinks = reasoning == "think" or (reasoning == AUTO and think.CLOSE in source)
    if tools == NONE:
        return Dialect(None, reads_tools, thinks)
    if tools == AUTO:
        return Dialect(FORMATS[found or "hermes"], found is not None, thinks)
    if not reads_tools and tools != "hermes":
        raise DialectError(
            f"--tool-format {tools}: the chat template does not read tools; leave it auto, or say "
            "hermes or none"
        )
    return Dialect(FORMATS[tools], reads_tools, thinks)


def _format(source: str) -> str | None:
    """The format that a template which reads tools writes calls in; None: not one of ours."""
    if "[TOOL_CALLS]" in source:
        return "mistral_named" if "[ARGS]" in source else "mistral"
    if OPEN in source:
        return None if "<function=" in source else "hermes"  # Qwen 3 Coder writes XML inside
    if "<|python_start|>" in source or "func_name1(" in source:
        return "pythonic"
    if "<|python_tag|>" in source or '"parameters": dictionary' in source:
        return "llama3_json"
    return None


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Mistral's templates want ids of nine letters and digits."""
    changed = dict(message)
    if isinstance(given := message.get("tool_call_id"), str):
        changed["tool_call_id"] = _short(given)
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short(str(call.get("id", "")))} for call in calls]
    return changed


def _short(call_id: str) -> str:
    if len(call_id) == _MISTRAL_ID_CHARS and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_MISTRAL_ID_CHARS]


# --- Tools for templates that know none -----------------------------------------------------------

_INTRODUCTION = f"""# Tools

You can call functions to help with the request. These are the functions, each with the JSON schema
of its parameters:
<tools>
{{tools}}
</tools>

To call one, answer with its name and its arguments as JSON inside {OPEN} and {CLOSE}:
{OPEN}
{{{{"name": "<name>", "arguments": {{{{<arguments>}}}}}}}}
{CLOSE}"""


def _as_text(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Tools as part of a system message, calls as an assistant's text, results as a user's."""
    told: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result:
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                told[-1]["content"] += f"\n{result}"
            else:
                told.append({"role": "user", "content": result})
        elif calls := message.get("tool_calls"):
            said = [message["content"]] if message["content"] else []
            told.append({"role": message["role"], "content": "\n".join(said + _called(calls))})
        else:
            told.append(message)
        after_result = is_result
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=listed)
    if told and told[0].get("role") == "system":
        first = {**told[0], "content": f"{told[0]['content']}\n\n{introduction}".lstrip()}
        return [first, *told[1:]]
    return [{"role": "system", "content": introduction}, *told]


def _called(calls: list[Any]) -> list[str]:
    bodies = (call.get("function", {}) for call in calls if isinstance(call, dict))
    objects = ({"name": f.get("name"), "arguments": f.get("arguments", {})} for f in bodies)
    return [f"{OPEN}\n{json.dumps(made, ensure_ascii=False)}\n{CLOSE}" for made in objects]
