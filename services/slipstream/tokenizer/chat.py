"""Chat messages to one text, by the model's own Jinja template, in a sandbox."""

import datetime
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from slipstream.errors import ErrorCode, Problem
from slipstream.messages import ChatPrompt
from slipstream.tokenizer.text import well_formed

RENDERED_CHARS_MAX = 32 * 2**20
"""A template may repeat its input; past this many characters it has gone wrong."""


class PromptError(Exception):
    """A prompt that cannot be encoded, with what the client is told."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refuse(code: ErrorCode, message: str, param: str | None) -> NoReturn:
    raise PromptError(Problem(code=code, message=message, param=param))


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Without underscore names: they reach the interpreter's insides."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} cannot be stored in a namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, and models were not trained on that."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """One compiled template. jinja2.TemplateSyntaxError if the source is none."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self.source = source
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        parsed = environment.parse(source)
        read = jinja2.meta.find_undeclared_variables(parsed)
        taken = _OURS | self._special_tokens.keys() | environment.globals.keys()
        self.arguments = frozenset(read - taken)
        """What `chat_template_kwargs` may set: what the template reads and nobody else sets."""
        self.reads_tools = any(name.name == "tools" for name in parsed.find_all(jinja2.nodes.Name))
        self._knows_developer = "developer" in source

    def render(self, prompt: ChatPrompt, messages: list[dict[str, Any]]) -> str:
        """The text that goes to the encoder. PromptError if the template refuses."""
        for name in prompt.template_args.keys() - self.arguments:
            known = ", ".join(sorted(self.arguments)) or "none"
            refuse(
                ErrorCode.INVALID_VALUE,
                f"This model's chat template has no argument {name[:64]!r}. It has: {known}.",
                "chat_template_kwargs",
            )
        goes_on = prompt.continue_final_message
        variables = {
            **self._special_tokens,
            **prompt.template_args,
            "messages": _with_mark(messages) if goes_on else messages,
            "tools": prompt.tools,
            "documents": None,
            "add_generation_prompt": prompt.add_generation_prompt and not goes_on,
        }
        try:
            text = self._bounded(variables)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            # A template is an expression over what the client sent, so these are refusals of it.
            reason = str(error).splitlines()[:1] or [type(error).__name__]
            refuse(
                ErrorCode.INVALID_VALUE,
                f"The model's chat template refuses these messages: {reason[0][:300]}",
                "messages",
            )
        return well_formed(_cut_at_mark(text) if goes_on else text)

    def _bounded(self, variables: dict[str, Any]) -> str:
        parts: list[str] = []
        length = 0
        for part in self._template.generate(variables):
            length += len(part)
            if length > RENDERED_CHARS_MAX:
                raise jinja2.TemplateError(f"the text exceeds {RENDERED_CHARS_MAX} characters")
            parts.append(part)
        return "".join(parts)

    def plain_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages as templates know them: text content, a system role, parsed tool arguments."""
        return [self._plain(message, index) for index, message in enumerate(messages)]

    def _plain(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        plain = {**message, "content": _text(message.get("content"), index)}
        if plain.get("role") == "developer" and not self._knows_developer:
            plain["role"] = "system"
        if plain.get("tool_calls"):
            plain["tool_calls"] = [_tool_call(call) for call in plain["tool_calls"]]
        return plain


_MARK = "CONTINUED_HERE "
"""Behind the last message's text, so that its end is found in what the template makes of it, as in
Transformers; the space tells whether the template keeps what is at the end of a message."""


def _with_mark(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = str(messages[-1]["content"]) if messages else ""
    if not last.strip():
        _nothing_to_continue()
    return [*messages[:-1], {**messages[-1], "content": last + _MARK}]


def _cut_at_mark(text: str) -> str:
    """Without what the template writes after the last message."""
    at = text.rfind(_MARK.strip())
    if at < 0:
        _nothing_to_continue()
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _nothing_to_continue() -> NoReturn:
    refuse(
        ErrorCode.INVALID_VALUE,
        "The last message has no text in the prompt that could be continued; give it some, or "
        "leave continue_final_message out.",
        "continue_final_message",
    )


def _text(content: Any, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(
            ErrorCode.INVALID_TYPE,
            "Message content must be a string or a list of text parts.",
            f"messages[{index}].content",
        )
    for number, part in enumerate(content):
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            refuse(
                ErrorCode.UNSUPPORTED_CONTENT,
                "This model reads text only; send content parts of type 'text'.",
                f"messages[{index}].content[{number}]",
            )
    return "".join(part["text"] for part in content)


def _tool_call(call: Any) -> Any:
    """OpenAI's clients send arguments as JSON text; templates expect the object."""
    match call:
        case {"function": {"arguments": str(text)} as function}:
            try:
                arguments = json.loads(text) if text.strip() else {}
            except (ValueError, RecursionError):
                return call
            if isinstance(arguments, dict):
                return {**call, "function": {**function, "arguments": arguments}}
    return call
