"""The `slipstream` command. Imports what a command needs only once it is known which one it is."""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from slipstream.cli.commands import (
    CONFIGURED,
    SERVICES,
    SUMMARIES,
    DoctorConfig,
    FitConfig,
    PrepareConfig,
    known_settings,
)
from slipstream.config import (
    ENV_PREFIX,
    HelpRequested,
    StartError,
    did_you_mean,
    env_of,
    load,
    load_with_origin,
    resolve,
)
from slipstream.config.help import help_text
from slipstream.config.loader import USAGE_ERROR
from slipstream.config.values import kind_of
from slipstream.simulate.config import SimulateConfig

INTERRUPTED = 130


_READ_BELOW = {env_of("cpu_kernels")}
"""Not a setting: `kernels.build` reads it, wherever it is imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors that a user can mend are one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments, os.environ)
    except StartError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str], environ: Mapping[str, str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if command in ("--version", "version"):
        print(f"slipstream {_version()}")
        return 0
    if command not in SUMMARIES:
        hint = did_you_mean(command, SUMMARIES)
        raise StartError(f"slipstream: unknown command {command}{hint}", USAGE_ERROR)
    try:
        if command == "model":
            return _model(rest, environ)
        if command == "doctor":
            return _doctor(rest, environ)
        if command == "config":
            return _config(rest, environ)
        if command == "serve":
            return _serve(rest, environ)
        if command == "simulate":
            return _simulate(rest, environ)
        return _service(command, rest, environ)
    except HelpRequested:
        print(help_text(CONFIGURED[command], command))
        return 0


def _service(command: str, rest: list[str], environ: Mapping[str, str]) -> int:
    config = resolve(load(SERVICES[command], command, rest, environ), environ)
    _set_title(command, rest)
    try:
        Path(config.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"slipstream {command}: --run-dir: {error}", 3) from None
    module = importlib.import_module(f"slipstream.{command}.__main__")
    return int(module.run(config))


def _serve(rest: list[str], environ: Mapping[str, str]) -> int:
    loaded = load_with_origin(CONFIGURED["serve"], "serve", rest, environ)
    _check_environment(environ)
    _set_title("serve", rest)
    from slipstream.cli.serve import serve

    return serve(loaded, environ)


def _simulate(rest: list[str], environ: Mapping[str, str]) -> int:
    if rest[:1] == ["fit"]:
        return _fit(rest[1:], environ)
    config = load(SimulateConfig, "simulate", rest, environ)
    from slipstream.simulate.__main__ import run

    return run(config)


def _fit(rest: list[str], environ: Mapping[str, str]) -> int:
    try:
        config = load(FitConfig, "simulate fit", rest, environ)
    except HelpRequested:
        print(help_text(FitConfig, "simulate fit"))
        return 0
    from slipstream.simulate.fit import as_toml, fit, recorded

    hardware, error = fit(recorded(Path(config.folder)))
    comment = f"Fitted by `slipstream simulate fit`; median error of a step {error:.1%}."
    print(as_toml(hardware, comment), end="")
    return 0


def _check_environment(environ: Mapping[str, str]) -> None:
    """A misspelt variable would be ignored in silence; nothing else begins with our prefix."""
    known = {env_of(name) for name in known_settings()} | {env_of("config"), *_READ_BELOW}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            hint = did_you_mean(name, known)
            print(f"slipstream serve: unknown variable {name}{hint}; ignored", file=sys.stderr)


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


def _model(rest: list[str], environ: Mapping[str, str]) -> int:
    if rest and rest[0] in ("-h", "--help"):
        print(help_text(PrepareConfig, "model prepare"))
        return 0
    if not rest or rest[0] != "prepare":
        hint = did_you_mean(rest[0], ["prepare"]) if rest else ""
        raise StartError(f"usage: slipstream model prepare [MODEL]{hint}", USAGE_ERROR)
    try:
        config = load(PrepareConfig, "model prepare", rest[1:], environ)
    except HelpRequested:
        print(help_text(PrepareConfig, "model prepare"))
        return 0
    from rich.console import Console

    from slipstream.cli.models import models_dir, prepare

    model = prepare(config.model, models_dir(environ), Console(stderr=True))
    print(model.folder)
    return 0


def _doctor(rest: list[str], environ: Mapping[str, str]) -> int:
    if rest[:1] in (["-h"], ["--help"]):
        print(help_text(DoctorConfig, "doctor transports"))
        return 0
    if rest[:1] != ["transports"]:
        hint = did_you_mean(rest[0], ["transports"]) if rest else ""
        raise StartError(f"usage: slipstream doctor transports [options]{hint}", USAGE_ERROR)
    try:
        config = load(DoctorConfig, "doctor transports", rest[1:], environ)
    except HelpRequested:
        print(help_text(DoctorConfig, "doctor transports"))
        return 0
    from slipstream.cli.doctor import transports

    print(transports(config))
    return 0


def _config(rest: list[str], environ: Mapping[str, str]) -> int:
    usage = "usage: slipstream config docs | slipstream config show COMMAND [options]"
    if rest[:1] == ["docs"] and len(rest) == 1:
        from slipstream.config.help import markdown

        print(markdown(CONFIGURED), end="")
        return 0
    if rest[:1] != ["show"] or len(rest) < 2 or rest[1] not in CONFIGURED:
        raise StartError(usage, USAGE_ERROR)
    command = rest[1]
    cls = CONFIGURED[command]
    try:
        loaded = load_with_origin(cls, command, rest[2:], environ)
    except HelpRequested:
        print(usage)
        return 0
    for field in msgspec.structs.fields(cls):
        value = getattr(loaded.config, field.name)
        shown = "…" if kind_of(field.type).secret and value != field.default else value
        print(f"{field.name} = {shown!r}  # {loaded.origin[field.name]}")
    return 0


def _overview() -> str:
    lines = ["Usage: slipstream COMMAND [options]", "", "Commands:"]
    lines += [f"  {name:<12}{summary}" for name, summary in SUMMARIES.items()]
    lines += ["", "slipstream COMMAND --help lists the settings of a command.", "--version"]
    return "\n".join(lines)


def _version() -> str:
    try:
        return importlib.metadata.version("slipstream")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
