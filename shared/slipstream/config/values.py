"""How one setting is written down: its kind, its bounds, and the text that a person types."""

import math
import re
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from slipstream.errors import ExitCode

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}

ByteSize = Annotated[int, Meta(ge=0, le=2**50, extra={"kind": "bytes"})]
"""A number of bytes; written as a number or as `512MiB`, `4GiB`, `1.5GB`."""


class StartError(Exception):
    """Why a process cannot start, in one line; the command prints it and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(StartError):
    """Settings that are wrong in themselves, wherever they come from and wherever they are used."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USAGE)


class SetupError(StartError):
    """Settings that are sound, and that this machine or this model does not give."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.SETUP)


def parse_bytes(text: str) -> int:
    """Bytes in `4GiB`, `512MiB`, `1.5 GB` or `4096`. ValueError if it is none of these."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(text)
    return round(float(found[1]) * _UNITS[found[2].lower()])


def format_bytes(count: int) -> str:
    """`parse_bytes` turned round: the largest binary unit, exact where a unit fits."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        size = _UNITS[unit.lower()]
        if count >= size:
            return f"{count // size}{unit}" if count % size == 0 else f"{count / size:.1f}{unit}"
    return f"{count}B"


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What the annotation of a setting says about it."""

    base: Any
    description: str = ""
    choices: tuple[str, ...] = ()
    positional: str = ""
    """Name of the argument in usage lines, if the setting is given without a flag."""
    secret: bool = False
    is_bytes: bool = False
    ge: float | None = None
    gt: float | None = None
    le: float | None = None

    @property
    def is_bool(self) -> bool:
        return self.base is bool

    @property
    def metavar(self) -> str:
        if self.choices:
            return "|".join(self.choices)
        if self.is_bytes:
            return "SIZE"
        return {int: "N", float: "X"}.get(self.base, "TEXT")

    @property
    def expected(self) -> str:
        """`an int >= 1 and <= 65535`"""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        noun = {int: "an int", float: "a number", bool: "true or false"}.get(self.base, "text")
        if self.is_bytes:
            noun = "a size such as 512MiB or 4GiB"
        bounds = [
            f"{sign} {bound:g}" if abs(bound) < 1e6 else f"{sign} {bound}"
            for sign, bound in ((">=", self.ge), (">", self.gt), ("<=", self.le))
            if bound is not None and not self.is_bytes
        ]
        return " ".join([noun, " and ".join(bounds)]).strip()


def kind_of(annotation: Any) -> Kind:
    """Reads `Annotated[…, Meta(…)]`; of several `Meta` the later one wins, field by field."""
    metas = [part for part in get_args(annotation) if isinstance(part, Meta)]
    base = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    choices = tuple(get_args(base)) if get_origin(base) is Literal else ()
    extra: dict[str, Any] = {}
    bounds: dict[str, Any] = {}
    for meta in metas:
        extra |= meta.extra or {}
        bounds |= {
            name: value
            for name in ("ge", "gt", "le", "description")
            if (value := getattr(meta, name)) is not None
        }
    return Kind(
        base=str if choices else base,
        choices=choices,
        positional=extra.get("positional", ""),
        secret=extra.get("secret", False),
        is_bytes=extra.get("kind") == "bytes",
        **bounds,
    )


def convert(text: Any, annotation: Any) -> Any:
    """The typed value of `text` (as typed, or as TOML gives it). ValueError: what was expected."""
    kind = kind_of(annotation)
    value = text
    if isinstance(text, str):
        value = _from_text(text, kind)
    elif isinstance(text, bool) and kind.base is not bool:
        raise ValueError(kind.expected)
    try:
        return msgspec.convert(value, annotation, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(_expectation(str(error), kind)) from None


def _from_text(text: str, kind: Kind) -> Any:
    word = text.strip().lower()
    try:
        if kind.is_bytes:
            return parse_bytes(text)
        if kind.base is bool:
            if word not in _TRUE | _FALSE:
                raise ValueError(text)
            return word in _TRUE
        if kind.base is float and not math.isfinite(float(text)):
            raise ValueError(text)
        return kind.base(text) if kind.base in (int, float) else text
    except ValueError:
        raise ValueError(kind.expected) from None


def _expectation(message: str, kind: Kind) -> str:
    """msgspec says which bound was broken; the rest of its wording is for programmers."""
    broken = re.fullmatch(r"Expected `(?:int|float)` ([<>]=? .+?)(?: - at .*)?", message)
    noun = "an int" if kind.base is int else "a number"
    if broken and not kind.is_bytes:
        return f"{noun} {broken[1]}"
    pattern = re.search(r"matching regex '(.*)'", message)
    if pattern:
        return f"text like {pattern[1]}"
    return kind.expected
