"""The wire is a closed vocabulary: processes of neighbouring versions understand each other."""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from slipstream.messages import INBOXES, AnyMessage, FrameHeader, Message
from slipstream.types import Role

SCHEMA = Path(__file__).parents[1] / "data" / "wire_schema.json"
"""Every message as of wire version 1. To add a field or a message: give the field a default, then
`python -m pytest tests/core/test_messages.py --update-wire-schema`."""
MESSAGES = get_args(AnyMessage)


def _schema() -> dict[str, Any]:
    _, components = msgspec.json.schema_components([AnyMessage, FrameHeader])
    schema = {
        name: {
            "properties": spec.get("properties", {}),
            "required": sorted(spec.get("required", [])),
            "prefixItems": spec.get("prefixItems", []),
        }
        for name, spec in components.items()
    }
    written: dict[str, Any] = json.loads(json.dumps(schema))
    return written


def test_nothing_on_the_wire_is_renamed_retyped_or_newly_required(
    request: pytest.FixtureRequest,
) -> None:
    now = _schema()
    if request.config.getoption("--update-wire-schema"):
        SCHEMA.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    before = json.loads(SCHEMA.read_text())
    for name, spec in before.items():
        assert name in now, f"{name} is gone"
        for field, kind in spec["properties"].items():
            assert now[name]["properties"].get(field) == kind, f"{name}.{field} changed"
        assert now[name]["required"] == spec["required"], f"{name}: a required field came or went"
        count = len(spec["prefixItems"])
        assert now[name]["prefixItems"][:count] == spec["prefixItems"], f"{name} changed"
    new = {
        n: sorted(now[n]["properties"].keys() - s["properties"].keys()) for n, s in before.items()
    }
    assert not any(new.values()) and now.keys() == before.keys(), "run --update-wire-schema"


def test_every_message_has_an_inbox_and_a_tag_of_its_own() -> None:
    in_inboxes = {message for inbox in INBOXES.values() for message in get_args(inbox)}
    assert in_inboxes == set(MESSAGES)
    tags = [message.__struct_config__.tag for message in MESSAGES]
    assert len(set(tags)) == len(tags)


def _example(kind: type[Message]) -> Message:
    """A message with something in every field that must be given."""
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if not field.required:
            continue
        for value in _VALUES:
            try:
                values[field.name] = msgspec.convert(value, field.type)
                break
            except msgspec.ValidationError:
                continue
        else:
            raise AssertionError(f"no example for {kind.__name__}.{field.name}")
    return kind(**values)


_NODE = {"node_id": "n", "role": "decode", "epoch": 1, "address": "a"}
_SAMPLING = {"max_tokens": 1, "seed": 0}
_PROMPT = {"type": "TextPrompt", "text": "hello"}
_PROBLEM = {"code": "internal_error", "message": "m"}
_PLAIN = ("x", 1, b"\1\0\0\0", 0.5, [], {}, True, Role.DECODE)
_VALUES = (*_PLAIN, _NODE, _SAMPLING, _PROMPT, _PROBLEM)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_comes_out_as_it_went_in(kind: type[Message]) -> None:
    message = _example(kind)
    packed = msgspec.msgpack.encode(message)
    for inbox in INBOXES.values():
        if kind in get_args(inbox):
            assert msgspec.msgpack.decode(packed, type=inbox) == message
        else:
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(packed, type=inbox)


def test_a_field_from_the_future_is_passed_over() -> None:
    for kind in MESSAGES:
        fields = msgspec.to_builtins(_example(kind)) | {"from_the_future": 1}
        assert msgspec.convert(fields, kind) == _example(kind)
