"""Writes docs/api-compatibility.md: `python -m slipstream.frontend.compatibility`."""

import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from slipstream.frontend.api_table import OPERATIONS, Body, limits
from slipstream.frontend.unserved import UNSERVED
from slipstream.frontend.validate import Limits

HEAD = """\
# Compatibility

Written by `make docs` from the structs and tables that the server itself uses
(`frontend/api_table.py`); limits are those of the default settings. What the fields mean is in
[api](api.md), what an error looks like in [errors](errors.md).

- **served**: does what the API's own documentation says.
- **ignored**: known, and changes no token.
- **refused**: would change the answer. 400 with `unsupported_parameter`, unless the field is null
  or has the value that is named here, which changes nothing.

A field that stands nowhere here is ignored.
"""


def page() -> str:
    return "\n".join([HEAD, *_paths(), *_bodies()])


def _paths() -> Iterator[str]:
    yield "## Paths\n"
    yield "| method and path | |\n|---|---|"
    for one in OPERATIONS:
        yield f"| `{one.method} {one.path}` | {one.does} |"
    yield "\nRefused with 404 and `unsupported_endpoint`, with everything below them:\n"
    yield "| path | there are no |\n|---|---|"
    for path, what in UNSERVED.items():
        yield f"| `{path}` | {what} |"
    yield "\nEvery other path: 404 with `unknown_url`.\n"


def _bodies() -> Iterator[str]:
    facets = limits(Limits())
    for operation in OPERATIONS:
        if operation.body is not None:
            yield f"## {operation.method} {operation.path}\n"
            yield "| field | | limits |\n|---|---|---|"
            for name, (verdict, said) in sorted(verdicts(operation.body, facets).items()):
                yield f"| `{name}` | {verdict} | {said} |"
            yield ""


def verdicts(body: Body, facets: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Field -> served, ignored or refused, and within which limits or why."""
    shape = body.shape
    refused = set(body.refused.__struct_fields__) if body.refused else set()
    found = {}
    for field in msgspec.structs.fields(shape):
        name = field.encode_name
        if name in body.ignored or name in refused:
            continue
        said = _said(facets.get(f"{shape.__name__}.{name}", facets.get(name, {})))
        found[name] = (
            "served",
            ("required" if field.required else "")
            + (f"; {said}" if field.required and said else said),
        )
    for name in sorted(refused - body.ignored.keys()):
        values = ", ".join(_json(value) for value in body.neutral.get(name, ()))
        found[name] = "refused", "but as `n`" if name == "best_of" else values and f"but {values}"
    return found | {name: ("ignored", why) for name, why in body.ignored.items()}


def _json(value: Any) -> str:
    return f"`{msgspec.json.encode(value).decode()}`"


def _said(facets: dict[str, Any]) -> str:
    """In words: ranges first."""
    low, high = facets.get("minimum"), facets.get("maximum")
    words = []
    if "exclusiveMinimum" in facets:
        words.append(f"above {facets['exclusiveMinimum']:g}")
        words.append(f"at most {_number(facets['maximum'])}")
    elif low is not None:
        words.append(f"from {low}" if high is None else f"{_number(low)} to {_number(high)}")
    if "enum" in facets:
        words.append(", ".join(_json(value) for value in facets["enum"] if value is not None))
    if "maxLength" in facets:
        words.append(f"{facets.get('minLength', 0)} to {facets['maxLength']} characters")
    elif "minLength" in facets:
        words.append("not empty")
    if "maxItems" in facets:
        words.append(f"at most {facets['maxItems']:,} entries")
    if "maxProperties" in facets:
        words.append(f"at most {facets['maxProperties']} members")
    if "pattern" in facets:
        words.append(f"none of `{facets['pattern'][3:-3]}`".replace("\\\\", "\\"))
    return ", ".join(words)


def _number(value: float) -> str:
    for bits in (63, 31):
        if abs(value) >= 2**bits - 1:
            return f"{'-' if value < 0 else ''}2^{bits}{'' if value < 0 else '-1'}"
    return f"{value:g}"


if __name__ == "__main__":
    sys.stdout.write(page())
