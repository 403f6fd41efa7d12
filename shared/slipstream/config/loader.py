"""One loader for every command: defaults < TOML file < environment < command line.

Reads nothing by itself but the file that `--config` names: arguments and environment are passed in.
"""

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec.structs import FieldInfo

from slipstream.config.values import ConfigError, Kind, convert, kind_of

ENV_PREFIX = "SLIPSTREAM_"
CONFIG_ENV = ENV_PREFIX + "CONFIG"

C = TypeVar("C", bound=msgspec.Struct)


class HelpRequested(Exception):
    """`--help` was among the arguments; the caller knows how to show it."""


class Loaded(msgspec.Struct, frozen=True):
    """A configuration, and where each of its values came from."""

    config: Any
    origin: dict[str, str]
    """Field -> `default`, `file.toml`, `SLIPSTREAM_PORT` or `--port`."""
    file: str
    """What `--config` named; empty: no file."""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def env_of(name: str) -> str:
    return ENV_PREFIX + name.upper()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing if nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


class _Parser(argparse.ArgumentParser):
    """argparse splits the words; types, bounds, help and errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message.replace('argument ', '')}")


def load(cls: type[C], command: str, argv: Sequence[str], environ: Mapping[str, str]) -> C:
    """The configuration of `slipstream <command>`. ConfigError: why not, in one line."""
    config = load_with_origin(cls, command, argv, environ).config
    assert isinstance(config, cls)
    return config


def load_with_origin(
    cls: type[msgspec.Struct], command: str, argv: Sequence[str], environ: Mapping[str, str]
) -> Loaded:
    prog = f"slipstream {command}"
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    flags = _parse_flags(prog, fields, argv)
    path = flags.pop("config", None) or environ.get(CONFIG_ENV, "")
    values: dict[str, Any] = {}
    origin = {name: "default" for name in fields}
    if path:
        for name, raw in _read_toml(prog, Path(path), command, fields).items():
            values[name] = _convert(prog, f"{path}: [{command}] {name}", raw, fields[name])
            origin[name] = path
    for name, field in fields.items():
        if raw := environ.get(env_of(name), ""):  # set but empty, as compose files do: not set
            values[name] = _convert(prog, env_of(name), raw, field)
            origin[name] = env_of(name)
    for name, raw in flags.items():
        label = kind_of(fields[name].type).positional or flag_of(name)
        values[name] = _convert(prog, label, raw, fields[name])
        origin[name] = label
    return Loaded(_build(prog, cls, fields, values), origin, path)


def _build(
    prog: str, cls: type[msgspec.Struct], fields: Mapping[str, FieldInfo], values: dict[str, Any]
) -> msgspec.Struct:
    missing = [n for n, field in fields.items() if field.required and n not in values]
    if missing:
        name = missing[0]
        label = kind_of(fields[name].type).positional or flag_of(name)
        raise ConfigError(f"{prog}: {label} is required (or {env_of(name)})")
    try:
        return cls(**values)
    except ValueError as error:  # a __post_init__ that compares fields
        raise ConfigError(f"{prog}: {error}") from None


def _parse_flags(prog: str, fields: Mapping[str, FieldInfo], argv: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(prog=prog, allow_abbrev=False, add_help=False)
    known = ["--config", "--help"]
    parser.add_argument("-h", "--help", action="store_true", default=False)
    parser.add_argument("--config", default=argparse.SUPPRESS)
    for name, field in fields.items():
        kind = kind_of(field.type)
        if kind.positional:
            parser.add_argument(name, nargs="?", default=argparse.SUPPRESS)
        elif kind.is_bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag_of(name), action=action, default=argparse.SUPPRESS, dest=name)
            known += [flag_of(name), "--no-" + name.replace("_", "-")]
        else:
            parser.add_argument(flag_of(name), default=argparse.SUPPRESS, dest=name)
            known.append(flag_of(name))
    several = sum(bool(kind_of(field.type).positional) for field in fields.values()) > 1
    # Of several positionals argparse takes none from behind a flag, unless told to.
    parse = parser.parse_known_intermixed_args if several else parser.parse_known_args
    found, unknown = parse(list(argv))
    flags = vars(found)
    if flags.pop("help"):
        raise HelpRequested
    if unknown:
        word = unknown[0].split("=")[0]
        what = "unknown flag" if word.startswith("-") else "unexpected argument"
        raise ConfigError(f"{prog}: {what} {word}{did_you_mean(word, known)}")
    return flags


def _read_toml(
    prog: str, path: Path, command: str, fields: Mapping[str, FieldInfo]
) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{prog}: --config: {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{prog}: {path}: {error}") from None
    outside = next((name for name, value in document.items() if not isinstance(value, dict)), None)
    if outside is not None and outside != command:
        line = f"{outside} stands outside of a section; write it under [{command}]"
        raise ConfigError(f"{prog}: {path}: {line}")
    section = document.get(command, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{prog}: {path}: [{command}] is not a table")
    for name in section:
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise ConfigError(f"{prog}: {path}: [{command}] has unknown key {name}{hint}")
    return section


def _convert(prog: str, label: str, raw: Any, field: FieldInfo) -> Any:
    try:
        return convert(raw, field.type)
    except ValueError as error:
        kind = kind_of(field.type)
        hint = did_you_mean(str(raw), kind.choices)
        got = _shown(raw, kind)
        raise ConfigError(f"{prog}: {label}: expected {error}, got {got}{hint}") from None


def _shown(raw: Any, kind: Kind) -> str:
    if kind.secret:
        return "something else"
    text = str(raw)
    return text if text and text.isprintable() and " " not in text else repr(raw)
