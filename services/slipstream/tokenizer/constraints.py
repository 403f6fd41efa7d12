"""What an answer must be, as a grammar of llguidance: from schemas, patterns and forced calls."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from slipstream.errors import ErrorCode
from slipstream.messages import ChatPrompt
from slipstream.tokenizer.chat import refuse
from slipstream.tokenizer.dialect import NONE, Dialect
from slipstream.tokenizer.formats import lark, think
from slipstream.tokenizer.formats.lark import Function
from slipstream.tokenizer.formats.tool_formats import ONE, THINKING, THINKS
from slipstream.types import Constraint, ConstraintKind

EBNF_CHARS_MAX = 1 << 16
"""Of a client's own grammar."""
GBNF_CHARS_MAX, GBNF_RULES_MAX = 1 << 15, 256
"""It is translated in Python, in a time that grows with the product of the two."""


class Answer(NamedTuple):
    """What is asked of an answer, and how it is read."""

    grammar: str = ""
    format: str = ""
    """As `formats.tool_formats.parser` reads it."""
    param: str = ""
    """The client's field that the grammar came from."""


def planned(
    prompt: ChatPrompt | None,
    constraint: Constraint | None,
    dialect: Dialect,
    added: Mapping[str, int],
    prompt_end: str,
) -> Answer:
    """`prompt`: a chat whose answer is told apart; None: the answer is text.

    `added`: text of tokens that are not made of others -> id. `prompt_end`: the last words of the
    rendered prompt.
    PromptError: INVALID_SCHEMA.
    """
    reasoning, words = "", []
    tools: list[dict[str, Any]] = []
    if prompt is not None:
        reasoning = _reasoning(prompt, prompt_end) if dialect.thinks else ""
        tools = prompt.tools or [] if prompt.tool_choice != NONE else []
        words.append(reasoning)
        if tools and dialect.tools is not None:
            words += [dialect.tools.name, "" if prompt.parallel_tool_calls else ONE]
    answer_format = " ".join(filter(None, words))
    forced = prompt is not None and bool(tools) and prompt.tool_choice != "auto"
    if not forced and constraint is None:
        return Answer(format=answer_format)

    def ref(text: str) -> str:
        return f"<[{added[text]}]>" if text in added else lark.text(text)

    options, rules = [], []
    if prompt is not None and tools and dialect.tools is not None:
        functions, calls_max = _functions(prompt, tools)
        try:
            rules.append(dialect.tools.rules(functions, calls_max, ref))
        except ValueError as error:
            _refuse(str(error), "tools")
        options.append("calls")
    others = []
    param = "tools"
    if constraint is not None and not forced:
        param = constraint.param
        answer = _answer(constraint)
        if not options and not reasoning:
            return Answer(_checked_length([answer], param), answer_format, param)
        others.append({"name": "answer", **answer})
        options.append("@answer")
    whole = f"({lark.either(options)})"
    rules.insert(0, _after_reasoning(whole, reasoning, think.CLOSE in added, ref))
    made = [{"lark_grammar": "\n".join(rules)}, *others]
    return Answer(_checked_length(made, param), answer_format, param)


def _reasoning(prompt: ChatPrompt, prompt_end: str) -> str:
    if prompt.continue_final_message:
        said = str(prompt.messages[-1].get("content") or "")
        return THINKING if said.rfind(think.OPEN) > said.rfind(think.CLOSE) else ""
    end = prompt_end.rstrip()
    return THINKING if end.endswith(think.OPEN) else "" if end.endswith(think.CLOSE) else THINKS


def _after_reasoning(rest: str, reasoning: str, closed_by_token: bool, ref: lark.Ref) -> str:
    """Rule `start`: the rest, where the answer is not in the middle of a thought."""
    if not reasoning:
        return f"start: {rest}"
    begun = f"thought {rest}" if reasoning == THINKING else f"({ref(think.OPEN)} thought)? {rest}"
    if closed_by_token:
        thought = f"thought: /(.|\\n)*/ {ref(think.CLOSE)} seam"
    else:
        # Lexemes are greedy unless they are called lazy, and a later `</think>` is one too many.
        thought = f"thought: thinking seam\nthinking[lazy]: /(.|\\n)*{think.CLOSE}/".replace(
            "</", "<\\/"
        )
    return f"start: {begun}\n{thought}\nseam: /[ \\n]{{0,4}}/"


def _functions(prompt: ChatPrompt, tools: list[dict[str, Any]]) -> tuple[list[Function], int]:
    """Those that may be called, and how often."""
    bodies = [tool["function"] for tool in tools]
    named = prompt.tool_choice.removeprefix("=") if prompt.tool_choice.startswith("=") else None
    if named is not None:
        bodies = [body for body in bodies if body["name"] == named]
        if not bodies:
            refuse(ErrorCode.INVALID_VALUE, f"There is no tool {named[:64]!r}.", "tool_choice")
    functions = [Function(body["name"], _schema(body.get("parameters"))) for body in bodies]
    once = named is not None or not prompt.parallel_tool_calls
    return functions, 1 if once else lark.CALLS_MAX


_OPEN_WORDS = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}


def _schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Of an object. What it has is named, unless the schema says otherwise: a small model would
    invent names."""
    schema = {"type": "object", **(parameters or {})}
    if "properties" in schema and not schema.keys() & _OPEN_WORDS:
        schema["additionalProperties"] = False
    return schema


def _answer(constraint: Constraint) -> dict[str, Any]:
    """One grammar of llguidance's list."""
    text, param = constraint.text, constraint.param
    if len(text) > lark.CHARS_MAX:
        _refuse(f"it has {len(text)} characters, at most {lark.CHARS_MAX} are taken", param)
    try:
        match constraint.kind:
            case ConstraintKind.JSON:
                return _json({"type": "object"})
            case ConstraintKind.JSON_SCHEMA:
                schema = msgspec.json.decode(text, type=dict[str, Any])
                return _json(schema, lenient=constraint.lenient)
            case ConstraintKind.REGEX:
                bare = text.removeprefix("^")
                if bare.endswith("$") and not bare.endswith("\\$"):
                    bare = bare.removesuffix("$")
                (made,) = msgspec.json.decode(LLMatcher.grammar_from_regex(bare))["grammars"]
                return {"lark_grammar": made["lark_grammar"]}
            case ConstraintKind.CHOICE:
                choices = msgspec.json.decode(text, type=list[str])
                if not choices:
                    _refuse("there are no choices", param)
                return {"lark_grammar": f"start: {lark.either([lark.text(c) for c in choices])}"}
            case ConstraintKind.GRAMMAR:
                if len(text) > EBNF_CHARS_MAX:
                    _refuse(f"a grammar has at most {EBNF_CHARS_MAX} characters", param)
                return {"lark_grammar": _lark(text)}
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        _refuse(str(error), param)


_gbnf_rules = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE).findall


def _lark(text: str) -> str:
    """Of Lark or GBNF, whose rules have other signs. ValueError."""
    rules = len(_gbnf_rules(text))
    if not rules:
        return text
    if len(text) > GBNF_CHARS_MAX or rules > GBNF_RULES_MAX:
        raise ValueError(
            f"a grammar in GBNF has at most {GBNF_CHARS_MAX} characters and {GBNF_RULES_MAX} rules,"
            f" this one has {len(text)} and {rules}; in Lark it may be longer"
        )
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the library raises no narrower one for a text that is none
        raise ValueError(str(error)) from error


def _json(schema: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"json_schema": {**schema, "x-guidance": {**lark.JSON_OPTIONS, **options}}}


def _checked_length(grammars: list[dict[str, Any]], param: str) -> str:
    try:
        made = msgspec.json.encode({"grammars": grammars}).decode()
    except RecursionError:
        _refuse("it is nested too deep", param)
    if len(made) > lark.CHARS_MAX:
        _refuse(f"it makes a grammar of more than {lark.CHARS_MAX} characters", param)
    return made


def unusable(reason: str, param: str) -> str:
    """For the client: why its schema or grammar is none."""
    plain = " ".join(reason.split())[:300].rstrip(".")
    return f"{param}: no answer can be held to this: {plain}."


def _refuse(reason: str, param: str) -> NoReturn:
    refuse(ErrorCode.INVALID_SCHEMA, unusable(reason, param), param)
