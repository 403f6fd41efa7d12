"""A server for one command: the one that --url names, or one that is started and ended with it."""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, NoReturn

from rich.console import Console

from slipstream.cli.commands import unknown_variables
from slipstream.cli.config import ServeConfig
from slipstream.cli.models import DEMO, Model, models_dir, prepare
from slipstream.cli.plan import child_path
from slipstream.cli.ready import POLL_S, ask
from slipstream.cli.supervisor import die_with_parent
from slipstream.config import StartError, flag_of, load_with_origin
from slipstream.errors import ExitCode

HOST = "127.0.0.1"
STOP_S = 15.0
"""Longest wait for its clean end; longer than the supervisor takes for its children."""
_OURS: dict[str, str] = {
    # One worker that does both: one person waits, and a second copy would take memory and cores.
    "prefill": "0",
    "kvindex": "0",
    "log_level": "warning",
    "drain_timeout_s": "0",
}
"""Where the user has not said otherwise."""


@contextlib.contextmanager
def server(
    prog: str, url: str, model: str, config_file: str, environ: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Its URL, and the name to ask it for: empty for its first. StartError: none can be had."""
    if url:
        yield url, model
        return
    console = Console(stderr=True)
    try:
        prepared = prepare(model or DEMO, models_dir(environ), console)
    except StartError as error:
        raise StartError(f"{prog}: {error}", error.exit_code) from None
    with _started(prog, prepared, config_file, environ, console) as started:
        yield started, ""


@contextlib.contextmanager
def _started(
    prog: str, model: Model, config_file: str, environ: Mapping[str, str], console: Console
) -> Iterator[str]:
    flags = serve_flags(model, config_file, environ)
    port = _free_port()
    command = [sys.executable, "-P", "-m", "slipstream.cli.main", "serve", str(model.folder)]
    hidden = set(unknown_variables(environ))  # pointed out already
    env = {name: value for name, value in environ.items() if name not in hidden}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said, _by_signal():
        process = subprocess.Popen(
            [*command, *flags, "--port", str(port)],
            env={**env, "PYTHONPATH": child_path(environ)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # Ctrl-C at an answer is not for the server
            preexec_fn=die_with_parent(),
        )
        try:
            _until_ready(prog, process, port, said, console)
            yield f"http://{HOST}:{port}"
        finally:
            _stop(process)


def serve_flags(model: Model, config_file: str, environ: Mapping[str, str]) -> list[str]:
    """For `slipstream serve`. Its environment variables and its section of the file hold, but for
    what one loopback port for one person needs."""
    given = ["--config", config_file] if config_file else []
    loaded = load_with_origin(ServeConfig, "serve", given, environ)
    ours = dict(_OURS)
    if loaded.config.disaggregation == "always":
        del ours["prefill"]
    settings = {
        **{name: value for name, value in ours.items() if loaded.origin[name] == "default"},
        "served_model_name": loaded.config.served_model_name or model.name,
        "host": HOST,
        "frontend": "1",
        "metrics_port": "0",
    }
    return given + [word for name, value in settings.items() for word in (flag_of(name), value)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _until_ready(
    prog: str,
    process: "subprocess.Popen[bytes]",
    port: int,
    said: IO[str],
    console: Console,
) -> None:
    """It gives up by itself, after `--ready-timeout-s`."""
    with console.status("starting") if console.is_terminal else contextlib.nullcontext() as status:
        while True:
            answer = ask(HOST, port)
            if answer.ready:
                return
            if process.poll() is not None:
                raise StartError(*_last_words(prog, process.returncode, said))
            reason = answer.body.reason if answer.body is not None else ""
            if status is not None:
                status.update(f"starting: {reason or 'loading'}")
            time.sleep(POLL_S)


def _last_words(prog: str, code: int, said: IO[str]) -> tuple[str, ExitCode]:
    """Its own last line, which says why, and its exit code."""
    said.seek(0)
    lines = [line for line in said.read().splitlines() if line.strip()]
    line = lines[-1] if lines else f"{prog}: the server ended with exit code {code}"
    return line, ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end us by way of our `finally`s, so that the server ends cleanly."""

    def end(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
