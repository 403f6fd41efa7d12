"""Help text and reference page, both generated from the structs."""

import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping

import msgspec
from msgspec.structs import FieldInfo

from slipstream.config.loader import CONFIG_ENV, env_of, flag_of
from slipstream.config.values import Kind, format_bytes, kind_of
from slipstream.errors import ExitCode

_WIDTH = 79
_COLUMN = 30


def help_text(cls: type[msgspec.Struct], command: str) -> str:
    """What `slipstream <command> --help` prints: at most 79 columns, grouped, with defaults."""
    fields = msgspec.structs.fields(cls)
    positional = [
        kind.positional if field.required else f"[{kind.positional}]"
        for field in fields
        if (kind := kind_of(field.type)).positional
    ]
    usage = " ".join([f"Usage: slipstream {command}", *positional, "[options]"])
    lines = [usage, "", *textwrap.wrap(_summary(cls), _WIDTH)]
    for heading, members in groups(cls):
        lines += ["", f"{heading}:"]
        for field in members:
            lines += _entry(field)
    lines += ["", "Always:"]
    lines += _two_columns("--config FILE", f"TOML file, section [{command}] ({CONFIG_ENV}).")
    lines += _two_columns("--help", "This text.")
    footer = "A flag wins over its environment variable, that over the file, that over the default."
    return "\n".join([*lines, "", *textwrap.wrap(footer, _WIDTH)])


def markdown(commands: Mapping[str, type[msgspec.Struct]]) -> str:
    """The page `docs/configuration.md`."""
    lines = [
        "# Configuration",
        "",
        "Generated from the settings structs by `slipstream config docs`; do not edit.",
        "",
        "A flag wins over its environment variable, that over the TOML file (`--config FILE` or",
        f"`{CONFIG_ENV}`, one section for each command), that over the default. An environment",
        "variable that is set but empty counts as not set. Sizes are written as `512MiB`, `4GiB`",
        "or a number of bytes. `slipstream config show COMMAND` prints every value and its origin.",
    ]
    for command, cls in commands.items():
        lines += ["", f"## slipstream {command}", "", _summary(cls)]
        for heading, members in groups(cls):
            lines += ["", f"### {command}: {heading}", ""]
            lines += ["| flag | environment | default | meaning |", "|---|---|---|---|"]
            lines += [_row(field) for field in members]
    lines += ["", "## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code.value} | {code.meaning} |" for code in ExitCode]
    lines += ["| 128 + n | Ended by a second signal n. |"]
    return "\n".join(lines) + "\n"


def groups(cls: type[msgspec.Struct]) -> Iterator[tuple[str, list[FieldInfo]]]:
    """Settings under headings: those the class gives itself, else by the class that declares them.

    What is special to a command comes first, what every service has comes last.
    """
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    own: Mapping[str, str] = getattr(cls, "headings", {})
    if own:
        names = list(fields)
        bounds = [*(names.index(first) for first in own), len(names)]
        for heading, (first, last) in zip(own.values(), itertools.pairwise(bounds), strict=True):
            yield heading, [fields[name] for name in names[first:last]]
        return
    for parent in cls.__mro__:
        declared = [n for n in inspect.get_annotations(parent) if n in fields]
        if members := [fields.pop(name) for name in declared]:
            yield _heading(parent), members


def _heading(cls: type) -> str:
    name = cls.__name__.removesuffix("Config")
    return {"Service": "Every service", "Worker": "Workers"}.get(name, name)


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _entry(field: FieldInfo) -> list[str]:
    kind = kind_of(field.type)
    if kind.positional:
        name = kind.positional
    elif kind.is_bool:
        name = "--[no-]" + field.name.replace("_", "-")
    else:
        name = f"{flag_of(field.name)} {kind.metavar}"
    note = f"[{_default(field, kind)}; {env_of(field.name)}]"
    return _two_columns(name, f"{kind.description} {note}")


def _two_columns(left: str, right: str) -> list[str]:
    wrapped = textwrap.wrap(right, _WIDTH - _COLUMN, break_long_words=False, break_on_hyphens=False)
    lines = [" " * _COLUMN + line for line in wrapped]
    if len(left) + 4 > _COLUMN:
        return [f"  {left}", *lines]
    return [f"  {left}".ljust(_COLUMN) + wrapped[0], *lines[1:]]


def _default(field: FieldInfo, kind: Kind) -> str:
    if field.required:
        return "required"
    default = field.default
    if kind.is_bool:
        return "on" if default else "off"
    if kind.is_bytes and default:
        return format_bytes(default)
    if isinstance(default, float):
        return f"{default:g}"
    return "empty" if default == "" else str(default)


def _row(field: FieldInfo) -> str:
    kind = kind_of(field.type)
    flag = f"`{kind.positional or flag_of(field.name)}`"
    if kind.is_bool:
        flag = f"`{flag_of(field.name)}`, `--no-{field.name.replace('_', '-')}`"
    meaning = kind.description
    if kind.choices:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in kind.choices)}."
    bounds = [
        f"{sign} {bound:.15g}"
        for sign, bound in (("≥", kind.ge), (">", kind.gt), ("≤", kind.le))
        if bound is not None and not kind.is_bytes
    ]
    if bounds:
        meaning += f" ({', '.join(bounds)})"
    default = _default(field, kind)
    shown = default if default in ("required", "empty") else f"`{default}`"
    cells = [flag, f"`{env_of(field.name)}`", shown, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
