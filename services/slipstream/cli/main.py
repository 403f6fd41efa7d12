"""The `slipstream` command. Imports what a command needs only once it is known which one it is."""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from slipstream.cli.commands import (
    COMMANDS,
    CONFIGURED,
    SERVICES,
    ApiKeyConfig,
    Command,
    DocsConfig,
    DoctorConfig,
    FitConfig,
    KeysConfig,
    PrepareConfig,
    TransportsConfig,
    known_variables,
    unknown_variables,
)
from slipstream.cli.config import ServeConfig
from slipstream.config import (
    ConfigError,
    HelpRequested,
    StartError,
    did_you_mean,
    load,
    load_with_origin,
    make_folder,
    resolve,
)
from slipstream.config.file import as_toml, check_sections, config_file
from slipstream.config.help import help_text
from slipstream.config.values import kind_of
from slipstream.errors import ExitCode
from slipstream.simulate.config import SimulateConfig

_HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors that a user can mend are one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments, os.environ)
    except StartError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK


def _run(arguments: list[str], environ: Mapping[str, str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in (*_HELP, "help"):
        print(_overview(COMMANDS))
        return ExitCode.OK
    if first in ("--version", "version"):
        print(f"slipstream {_version()}")
        return ExitCode.OK
    group = {name: one for name, one in COMMANDS.items() if name.split()[0] == first}
    if not group:
        raise ConfigError(f"slipstream: unknown command {first}{_command_meant(first)}")
    name = next((name for name in (" ".join(arguments[:2]), first) if name in group), None)
    rest = arguments[len(name.split()) if name else 1 :]
    if name is None or _is_misspelt_half(group, name, rest):
        return _part_of(group, first, rest)
    _point_out(name, environ)
    check_sections(f"slipstream {name}", config_file(rest, environ), COMMANDS)
    try:
        return _RUNNERS[name](name, rest, environ)
    except HelpRequested:
        print(help_text(COMMANDS[name].settings, name))
        return ExitCode.OK


def _command_meant(word: str) -> str:
    """Also the second half of a command by itself: `prepare`, `transports`."""
    halves = {part: name for name in COMMANDS for part in reversed(name.split())}
    if word in halves:
        return f" (did you mean {halves[word]}?)"
    return did_you_mean(word, {name.split()[0] for name in COMMANDS} | set(COMMANDS))


def _is_misspelt_half(group: Mapping[str, Command], name: str, rest: list[str]) -> bool:
    """`doctor transprots`: a command by itself, and a word behind it that is nearly another's."""
    words = [one.split()[1] for one in group if " " in one]
    return name in group and " " not in name and bool(rest and did_you_mean(rest[0], words))


def _part_of(group: Mapping[str, Command], first: str, rest: list[str]) -> int:
    """One word of two."""
    if rest and rest[0] in _HELP:
        print(_overview(group))
        return ExitCode.OK
    words = [name.split()[1] for name in group if " " in name]
    got = f"got {rest[0]}{did_you_mean(rest[0], words)}" if rest else "got nothing"
    raise ConfigError(f"slipstream {first}: expected {' or '.join(words)}, {got}")


def _point_out(name: str, environ: Mapping[str, str]) -> None:
    """A misspelt variable would be ignored in silence."""
    for variable in unknown_variables(environ):
        hint = did_you_mean(variable, known_variables())
        print(f"slipstream {name}: unknown variable {variable}{hint}; ignored", file=sys.stderr)


def _service(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = resolve(load(SERVICES[command], command, rest, environ), environ)
    _set_title(command, rest)
    make_folder(f"slipstream {command}", "--run-dir", Path(config.run_dir), 0o700)
    module = importlib.import_module(f"slipstream.{command}.__main__")
    return int(module.run(config))


def _serve(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    loaded = load_with_origin(ServeConfig, command, rest, environ)
    _set_title(command, rest)
    from slipstream.cli.serve import serve

    return serve(loaded, environ)


def _simulate(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = load(SimulateConfig, command, rest, environ)
    from slipstream.simulate.__main__ import run

    return run(config)


def _fit(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = load(FitConfig, command, rest, environ)
    from slipstream.simulate.fit import as_toml, fit, recorded

    hardware, error = fit(recorded(Path(config.folder)))
    comment = f"Fitted by `slipstream simulate fit`; median error of a step {error:.1%}."
    print(as_toml(hardware, comment), end="")
    return ExitCode.OK


def _prepare(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = load(PrepareConfig, command, rest, environ)
    from rich.console import Console

    from slipstream.cli.models import link_to, models_dir, prepare

    folder = prepare(config.model, models_dir(environ), Console(stderr=True)).folder
    if config.link:
        link_to(folder, Path(config.link))
    print(folder)
    return ExitCode.OK


def _ask(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    """run, chat, batch."""
    loaded = load_with_origin(COMMANDS[command].settings, command, rest, environ)
    _set_title(command, rest)
    module = importlib.import_module(f"slipstream.cli.{command}")
    return int(getattr(module, command)(loaded, environ))


def _watch(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    """top, trace, bench."""
    config = load(COMMANDS[command].settings, command, rest, environ)
    _set_title(command, rest)
    module = importlib.import_module(f"slipstream.cli.{command}")
    return int(getattr(module, command)(config))


def _doctor(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = load(DoctorConfig, command, rest, environ)
    from slipstream.cli.checkup import State, checks, screen

    found = list(checks(config, environ))
    print(msgspec.json.encode(found).decode() if config.json else screen(found))
    return ExitCode.FAILED if any(one.state is State.FAIL for one in found) else ExitCode.OK


def _transports(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = load(TransportsConfig, command, rest, environ)
    from slipstream.cli.doctor import transports

    print(transports(config))
    return ExitCode.OK


def _keys(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = load(KeysConfig, command, rest, environ)
    from slipstream.curve import generate

    made = generate(Path(config.folder))
    print(f"{config.folder}: {'keys made' if made else 'keys are there'}")
    return ExitCode.OK


def _api_key(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = load(ApiKeyConfig, command, rest, environ)
    from slipstream.frontend.api_keys import ApiKey, add

    given = msgspec.structs.asdict(config)
    path = Path(given.pop("api_keys_file"))
    print(add(path, msgspec.convert({**given, "sha256": "0" * 64}, ApiKey)))
    print(f"{path}: {config.name} added; the key is shown this once", file=sys.stderr)
    return ExitCode.OK


def _docs(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    load(DocsConfig, command, rest, environ)
    from slipstream.config.help import markdown

    print(markdown(CONFIGURED), end="")
    return ExitCode.OK


def _show(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    if any(word in _HELP for word in rest):
        raise HelpRequested
    named = bool(rest) and not rest[0].startswith("-")
    shown = rest[0] if named else "serve"
    if shown not in CONFIGURED:
        got = f"{shown}{did_you_mean(shown, CONFIGURED)}"
        raise ConfigError(
            f"slipstream {command}: expected one of {', '.join(CONFIGURED)}, got {got}"
        )
    origin = "--no-origin" not in rest
    flags = [word for word in rest[named:] if word not in ("--origin", "--no-origin")]
    loaded = load_with_origin(CONFIGURED[shown], shown, flags, environ)
    print("\n".join(as_toml(shown, loaded, origin)))
    return ExitCode.OK


_RUNNERS: dict[str, Callable[[str, list[str], Mapping[str, str]], int]] = {
    "serve": _serve,
    "run": _ask,
    "chat": _ask,
    "batch": _ask,
    "top": _watch,
    "trace": _watch,
    "bench": _watch,
    "doctor": _doctor,
    **dict.fromkeys(SERVICES, _service),
    "simulate": _simulate,
    "simulate fit": _fit,
    "model prepare": _prepare,
    "doctor transports": _transports,
    "keys make": _keys,
    "keys api": _api_key,
    "config show": _show,
    "config docs": _docs,
}
assert _RUNNERS.keys() == COMMANDS.keys()


def _set_title(command: str, rest: list[str]) -> None:
    """`ps` shows `slipstream decode --node-id decode-0 …`, without secrets."""
    from setproctitle import setproctitle

    fields = msgspec.structs.fields(CONFIGURED[command])
    secrets = {"--" + f.name.replace("_", "-") for f in fields if kind_of(f.type).secret}
    shown: list[str] = []
    for before, word in zip(["", *rest], rest, strict=False):
        flag, has_value, _ = word.partition("=")
        if before in secrets:
            word = "…"
        elif flag in secrets and has_value:
            word = f"{flag}=…"
        shown.append(word)
    setproctitle(" ".join(["slipstream", command, *shown]))


def _overview(commands: Mapping[str, Command]) -> str:
    lines = ["Usage: slipstream COMMAND [options]", "", "Commands:"]
    lines += [f"  {name:<19}{command.summary}" for name, command in commands.items()]
    lines += ["", "slipstream COMMAND --help lists the settings of a command.", "--version"]
    return "\n".join(lines)


def _version() -> str:
    try:
        return importlib.metadata.version("slipstream")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
