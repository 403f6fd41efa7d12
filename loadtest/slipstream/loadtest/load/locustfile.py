"""For `locust -f`: users and shape of a run, its metrics as locust's, and the report at its end."""

import datetime
import logging
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import msgspec
from locust import LoadTestShape, User, events
from locust.runners import LocalRunner

from slipstream.loadtest.load.connection import Server
from slipstream.loadtest.load.page import lines, page
from slipstream.loadtest.load.report import Client, report_of
from slipstream.loadtest.load.run import Run
from slipstream.loadtest.load.scenarios import SCENARIOS
from slipstream.loadtest.load.settings import add_arguments, settings_of

log = logging.getLogger("slipstream.load")
SPAWN_PER_S = 100.0


class Failed(Exception):
    """What locust counts as the failure of a request."""


class Shape(LoadTestShape):  # type: ignore[misc]
    """Follows the plan of the run, which begins with the first tick."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self._crashes = 0

    def reset_time(self) -> None:
        super().reset_time()
        self.run = None

    def tick(self) -> tuple[int, float] | None:
        if self.run is None:
            try:
                self.run = self._begin()
            except (OSError, ValueError) as error:
                log.error("%s: %s", self._environment.host, error)
                self._environment.process_exit_code = 1
                return None
        users = self.run.users()
        if users is None:
            self.end()
            return None
        return users, SPAWN_PER_S

    def end(self, interrupted: bool = False) -> None:
        """Writes the report, once."""
        if self.run is None:
            return
        run, self.run = self.run, None
        run.finish(interrupted)
        client = Client(
            cpu_share=run.cpu_share,
            not_sent=run.not_sent,
            crashes=self._crashes,
            compared=run.answers.compared,
            interrupted=interrupted,
        )
        now = datetime.datetime.now(datetime.UTC)
        report = report_of(
            run.settings,
            run.scenario,
            run.plan.spans,
            run.samples,
            client,
            elapsed_s=run.now_s(),
            capacity_rps=run.capacity_rps,
            date=f"{now:%Y-%m-%d %H:%M} UTC",
            url=self._environment.host,
            model=run.model,
        )
        folder = Path(run.settings.report_dir or f"build/load/{now:%Y%m%d-%H%M%S}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(page(report), encoding="utf-8")
        numbers = msgspec.json.format(msgspec.json.encode(report), indent=1)
        (folder / "report.json").write_bytes(numbers + b"\n")
        print("\n".join(["", *lines(report), "", f"report: {folder / 'report.html'}"]), flush=True)
        self._environment.process_exit_code = 0 if report.ok else 1

    def crashed(self, **_: Any) -> None:
        """A programming error in the client: what is measured then means nothing."""
        self._crashes += 1

    @property
    def _environment(self) -> Any:
        return self.runner.environment

    def _begin(self) -> Run:
        """OSError, ValueError: the server does not answer."""
        settings = settings_of(self._environment.parsed_options)
        key = settings.api_key_file
        key_text = Path(key).read_text(encoding="utf-8").strip() if key else ""
        server = Server(self._environment.host, key_text, settings.timeout_s)
        model = settings.model_name or server.model_name()
        return Run(settings, server, model, self._spawn, self._fire)

    def _spawn(self, act: Callable[[], None]) -> None:
        gevent.spawn(act).link_exception(lambda _: self.crashed())

    def _fire(self, kind: str, name: str, took_ms: float, tokens: int, failure: str) -> None:
        self._environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=took_ms,
            response_length=tokens,
            exception=Failed(failure) if failure else None,
            context={},
        )


class LoadUser(User):  # type: ignore[misc]
    """Does what the run of the shape says."""

    def act(self) -> None:
        run = self.environment.shape_class.run
        if run is None:
            gevent.sleep(0.1)
        else:
            run.act()

    tasks = [act]  # noqa: RUF012


def _arguments(parser: ArgumentParser) -> None:
    add_arguments(parser)


def _check(environment: Any, **_: Any) -> None:
    """SystemExit: what was asked for cannot be done."""
    try:
        settings = settings_of(environment.parsed_options)
        if settings.scenario not in SCENARIOS:
            raise ValueError(f"--scenario: expected one of {', '.join(SCENARIOS)}")
        if not isinstance(environment.runner, LocalRunner):
            raise ValueError("one process only: the checks hold all answers against each other")
    except ValueError as error:
        raise SystemExit(f"load: {error}") from None
    if not environment.host:
        raise SystemExit("load: --host URL is needed")
    events.user_error.add_listener(environment.shape_class.crashed)


def _quitting(environment: Any, **_: Any) -> None:
    environment.shape_class.end(interrupted=True)


events.init_command_line_parser.add_listener(_arguments)
events.init.add_listener(_check)
events.quitting.add_listener(_quitting)
