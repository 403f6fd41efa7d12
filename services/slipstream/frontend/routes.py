"""Other names for models, and copies of their traffic, as a file says: read again when it changes.

[alias."chat"]            # asked for as "chat": nine calls of ten go to one, one to the other
"smollm2" = 90
"smollm2-next" = 10

[shadow."smollm2"]        # every twentieth call is also computed there, and thrown away
to = "smollm2-next"
share = 0.05
"""

import hashlib
import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from slipstream.config import SetupError

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Weight = Annotated[float, Meta(ge=0, le=1e9)]
NAMES_MAX, TARGETS_MAX = 1024, 16


class Shadow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    to: Name
    share: Annotated[float, Meta(ge=0, le=1)] = 1.0


class Routes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names are followed once: an alias may have the name of one of its models, and then stands in
    front of it."""

    alias: dict[Name, dict[Name, Weight]] = {}
    shadow: dict[Name, Shadow] = {}

    def target(self, name: str, key: str, ready: Collection[str], known: Collection[str]) -> str:
        """The model that answers to `name` for the call `key`: of those that are `ready`, else of
        those that are `known`. When one leaves, the calls of the others stay where they are."""
        weights = self.alias.get(name)
        if weights is None:
            return name
        able = [model for model, weight in weights.items() if weight > 0]
        for there in (ready, known):
            if some := [model for model in able if model in there]:
                return max(some, key=lambda model: _score(key, model, weights[model]))
        return ""

    def copied(self, model: str, key: str) -> str:
        """Where a copy of the call goes; empty: nowhere."""
        shadow = self.shadow.get(model)
        return shadow.to if shadow is not None and _drawn(key, "") < shadow.share else ""


def _score(key: str, model: str, weight: float) -> float:
    """Of weighted rendezvous hashing: the largest one wins with the weight's share."""
    return -weight / math.log(_drawn(key, model))


def _drawn(key: str, model: str) -> float:
    """In (0, 1), the same at every frontend."""
    drawn = hashlib.blake2b(f"{model}\0{key}".encode(), digest_size=8).digest()
    return ((int.from_bytes(drawn) >> 12) + 0.5) / 2**52


def read(path: str | Path) -> Routes:
    """SetupError: the file cannot be used, and why."""
    found: dict[str, object] = {}
    try:
        found = tomllib.loads(Path(path).read_text())
        routes = msgspec.convert(found, Routes)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise SetupError(f"slipstream frontend: {path}: {error}{_hint(found)}") from None
    _check(path, routes.alias)
    for name, shadow in routes.shadow.items():
        # An alias may lead to the model of its own name.
        other = shadow.to in routes.alias or name not in routes.alias.get(name, {name})
        if name == shadow.to or other:
            raise SetupError(
                f"slipstream frontend: {path}: shadow '{name}' to '{shadow.to}': a shadow goes "
                "from one model to another, and an alias is none; name the models behind it"
            )
    return routes


def _hint(found: Mapping[str, object]) -> str:
    """If a table stands where none may: TOML has divided a name at its dots."""
    entries = [
        value
        for kind in ("alias", "shadow")
        if isinstance(named := found.get(kind), dict)
        for entry in named.values()
        if isinstance(entry, dict)
        for value in entry.values()
    ]
    divided = any(isinstance(value, dict) for value in entries)
    return '; a name with a dot is written in quotes: "qwen2.5"' if divided else ""


def _check(path: str | Path, alias: Mapping[str, Mapping[str, float]]) -> None:
    if len(alias) > NAMES_MAX:
        raise SetupError(f"slipstream frontend: {path}: {len(alias)} aliases, at most {NAMES_MAX}")
    for name, weights in alias.items():
        if not 1 <= len(weights) <= TARGETS_MAX or not any(weights.values()):
            raise SetupError(
                f"slipstream frontend: {path}: alias '{name}' has {len(weights)} models; it takes "
                f"1 to {TARGETS_MAX}, one of them with a weight above 0"
            )
