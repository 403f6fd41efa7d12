"""What a body wants its answer to be: `response_format`, and vLLM's `structured_outputs`."""

import re
from typing import Any

import msgspec

from slipstream.errors import ErrorCode
from slipstream.frontend.openai import Generate
from slipstream.frontend.validate import at_most, check_depth, not_empty, refuse, shown
from slipstream.types import Constraint, ConstraintKind

TEXT_BYTES_MAX = 256 * 1024
CHOICES_MAX = 4096
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FORMAT = "response_format"
_OUTPUTS = "structured_outputs"


def constraint_of(body: Generate) -> Constraint | None:
    check_depth(_FORMAT, body.response_format)
    check_depth(_OUTPUTS, body.structured_outputs)
    found = [_of_format(body.response_format), _of_outputs(body.structured_outputs)]
    if all(found):
        refuse(f"{_FORMAT} and {_OUTPUTS} exclude each other; leave one of them out.", _OUTPUTS)
    return found[0] or found[1]


def _of_format(given: dict[str, Any] | None) -> Constraint | None:
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Constraint(kind=ConstraintKind.JSON, param=_FORMAT)
        case {"type": "json_schema"}:
            return _named_schema(given.get("json_schema"))
    refuse(
        f"{_FORMAT}.type must be 'text', 'json_object' or 'json_schema', but is "
        f"{shown(given.get('type'))}.",
        f"{_FORMAT}.type",
    )


def _named_schema(given: Any) -> Constraint:
    at = f"{_FORMAT}.json_schema"
    if not isinstance(given, dict):
        code = ErrorCode.MISSING_PARAMETER if given is None else ErrorCode.INVALID_TYPE
        refuse(f"{at} must be an object with a name and a schema, but is {shown(given)}.", at, code)
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        code = ErrorCode.MISSING_PARAMETER if name is None else ErrorCode.INVALID_VALUE
        text = f"{at}.name must be 1 to 64 letters, digits, '_' or '-', but is {shown(name)}."
        refuse(text, f"{at}.name", code)
    schema = given.get("schema")
    if not isinstance(schema, dict):
        code = ErrorCode.MISSING_PARAMETER if schema is None else ErrorCode.INVALID_TYPE
        text = f"{at}.schema must be a JSON schema, but is {shown(schema)}."
        refuse(text, f"{at}.schema", code)
    held = _bounded(ConstraintKind.JSON_SCHEMA, _json(schema), f"{at}.schema")
    return msgspec.structs.replace(held, lenient=given.get("strict") is not True)


_MEMBERS = ("json", "json_object", "regex", "choice", "grammar")


def _of_outputs(given: dict[str, Any] | None) -> Constraint | None:
    if given is None:
        return None
    for name in given.keys() - set(_MEMBERS):
        if not _is_nothing(given[name]):
            refuse(
                f"{_OUTPUTS} has {shown(name)}, which is not served; it may have one of "
                f"{', '.join(_MEMBERS)}.",
                f"{_OUTPUTS}.{name[:64]}",
                ErrorCode.UNSUPPORTED_PARAMETER,
            )
    named = [name for name in _MEMBERS if not _is_nothing(given.get(name))]
    if len(named) != 1:
        text = f"{_OUTPUTS} must have one of {', '.join(_MEMBERS)}, but has {len(named)}."
        refuse(text, _OUTPUTS)
    return _output(named[0], given[named[0]], f"{_OUTPUTS}.{named[0]}")


def _is_nothing(value: Any) -> bool:
    return value is None or value is False


def _output(name: str, value: Any, at: str) -> Constraint:
    match name, value:
        case "json", dict():
            return _bounded(ConstraintKind.JSON_SCHEMA, _json(value), at)
        case "json", str():
            return _bounded(ConstraintKind.JSON_SCHEMA, value, at)
        case "json_object", True:
            return Constraint(kind=ConstraintKind.JSON)
        case (("regex" | "grammar"), str()):
            return _bounded(ConstraintKind(name), value, at)
        case "choice", list() if all(isinstance(one, str) and one for one in value):
            not_empty(at, value, "name the strings that the answer may be")
            at_most(at, value, CHOICES_MAX)
            return _bounded(ConstraintKind.CHOICE, _json(value), at)
    refuse(f"{at} cannot be {shown(value)}.", at, ErrorCode.INVALID_TYPE)


def _bounded(kind: ConstraintKind, text: str, at: str) -> Constraint:
    if not text:
        refuse(f"{at} is empty; leave it out.", at)
    if len(text.encode()) > TEXT_BYTES_MAX:
        refuse(
            f"{at} has {len(text.encode())} bytes; at most {TEXT_BYTES_MAX} are allowed.",
            at,
            ErrorCode.INVALID_SCHEMA,
        )
    return Constraint(kind=kind, text=text, param=at.partition(".")[0])


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
