"""Grammars in the Lark dialect of llguidance, of which the formats build theirs."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

CHARS_MAX = 1 << 20
"""Of one grammar, as `SamplingParams.grammar` has."""
CALLS_MAX = 16
"""Of an answer that is held to calls: a small model may find no end."""

Ref: TypeAlias = Callable[[str], str]
"""A marker as grammars write it: as a token where one was added for it, else as text."""

JSON_OPTIONS = {
    # A space or a line with its indentation. Without a bound small models write spaces for good.
    "whitespace_pattern": r"(\n {0,24}| ?)",
    "coerce_one_of": True,
}


class Function(NamedTuple):
    """What may be called."""

    name: str
    schema: dict[str, Any]
    """JSON schema of its arguments, an object's."""


def text(value: str) -> str:
    return json.dumps(value)


def json_value(schema: dict[str, Any], **options: Any) -> str:
    """Something that follows the schema."""
    told = {**schema, "x-guidance": {**JSON_OPTIONS, **options}}
    return f"%json {msgspec.json.encode(told).decode()}"


def arguments(schema: dict[str, Any]) -> str:
    """As `json_value`, of what a client said about its function: keywords that nobody can hold an
    answer to are passed over, for the function checks its arguments anyway."""
    return json_value(schema, lenient=True)


def either(options: Sequence[str]) -> str:
    return " | ".join(options)


def repeated(rule: str, between: str, calls_max: int) -> str:
    """One or more, with something between them."""
    more = f" ({between} {rule}){{0,{calls_max - 1}}}" if calls_max > 1 else ""
    return f"{rule}{more}"


def json_calls(functions: Sequence[Function], key: str) -> str:
    """Rule `object`: a call of one of the functions as a JSON object."""
    begins = (f'{{"name": {text(f.name)}, "{key}": ' for f in functions)
    objects = [f"{text(begin)} arguments_{i} {text('}')}" for i, begin in enumerate(begins)]
    rules = [f"arguments_{i}: {arguments(f.schema)}" for i, f in enumerate(functions)]
    return "\n".join([f"object: {either(objects)}", *rules])
