"""The TOML file as a whole: which sections may be in it, and settings written down as one."""

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from slipstream.config.loader import CONFIG_ENV, Loaded, did_you_mean
from slipstream.config.values import ConfigError, kind_of

_FLAG = "--config"


def config_file(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The path that the loader will read; empty: none."""
    for index, word in enumerate(argv):
        flag, is_one, value = word.partition("=")
        if flag == _FLAG:
            return value if is_one else "".join(argv[index + 1 : index + 2])
    return environ.get(CONFIG_ENV, "")


def check_sections(prog: str, path: str, known: Collection[str]) -> None:
    """ConfigError: a section belongs to no command, so that it would be ignored in silence. What
    else is wrong with the file is for the loader to say."""
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return
    for name, section in document.items():
        if isinstance(section, dict) and name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{prog}: {path}: [{name}] is no command{hint}")


def as_toml(command: str, loaded: Loaded, origin: bool) -> Iterator[str]:
    """Lines that `--config` reads; secrets are left out of them."""
    yield f"[{command}]"
    for field in msgspec.structs.fields(loaded.config):
        value = getattr(loaded.config, field.name)
        hidden = kind_of(field.type).secret and value != field.default
        line = f"{field.name} = {_value('…' if hidden else value)}"
        notes = [loaded.origin[field.name]] if origin else []
        notes += ["not shown"] if hidden else []
        yield f"{line}  # {', '.join(notes)}" if notes else line


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
