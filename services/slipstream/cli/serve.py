"""`slipstream serve`: every process on this machine, from model file to READY to a clean end."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec

from slipstream.cli.config import ServeConfig
from slipstream.cli.models import Model, models_dir, prepare
from slipstream.cli.plan import REDIS, Layout, metrics_ports, plan, redis_binary
from slipstream.cli.preflight import preflight
from slipstream.cli.ready import Readyz, ask, reachable, ready_block, until_ready
from slipstream.cli.run_dir import is_alive, joined, private_run_dir, run_dir_base, sweep
from slipstream.cli.screen import Screen
from slipstream.cli.supervisor import Failure, Supervisor
from slipstream.config import Loaded, SetupError, StartError
from slipstream.errors import ExitCode
from slipstream.runtime.ports import require_free

_SERVICES = ("scheduler", "kvindex", "tokenizer", "prefill", "decode")
STOP_ORDER: Sequence[Sequence[str]] = (("frontend",), _SERVICES, (REDIS,))
"""Frontends first: they finish their streams while everybody else still works."""
JOINED_LOOK_S = 1.0
SECOND_SIGNAL_S = 1.0
"""A signal sooner than this after the first is its echo: make passes on what its group got too."""


def serve(loaded: Loaded, environ: Mapping[str, str]) -> int:
    """Runs until a signal or a failure; the exit code."""
    config = loaded.config
    assert isinstance(config, ServeConfig)
    started = time.monotonic()
    screen = Screen()
    for port in () if config.join else _http_ports(config):
        require_free("slipstream serve", "--port", config.host, port)
    for port in metrics_ports(config):
        require_free("slipstream serve", "--metrics-port", "127.0.0.1", port)
    base = joined(config.join, environ) if config.join else run_dir_base(config.run_dir, environ)
    layout = Layout(
        config=config,
        given=[name for name, origin in loaded.origin.items() if origin != "default"],
        config_file=str(Path(loaded.file).absolute()) if loaded.file else "",
        model=Path(config.model),
        model_name=config.served_model_name,
        run_dir=base,
        environ=environ,
    )
    if not config.join:
        sweep(base, config.shm_dir)  # or what a killed run has left would count as memory in use
    preflight(plan(layout))  # before the model, which may have to be fetched or converted
    try:
        weights = config.load_format != "dummy"
        model = prepare(config.model, models_dir(environ), screen.console, weights)
    except StartError as error:
        raise StartError(f"slipstream serve: {error}", error.exit_code) from None
    run_dirs = nullcontext(base) if config.join else private_run_dir(base, config.shm_dir)
    with run_dirs as run_dir:
        layout = msgspec.structs.replace(
            layout,
            model=model.folder,
            model_name=config.served_model_name or model.name,
            run_dir=run_dir,
        )
        if config.join:
            _check_joined(layout)
        return asyncio.run(_supervise(layout, model, screen, started))


def _check_joined(layout: Layout) -> None:
    """SetupError: no frontend is where it is said to be, or the model is served there already."""
    config = layout.config
    where = f"{config.host}:{config.port}"
    answer = ask(config.host, config.port)
    if answer.body is None:
        raise SetupError(
            f"slipstream serve: --join: no frontend answers at {where}; name one that does by "
            "--host and --port"
        )
    ours = {spec.node_id for spec in plan(layout)}
    if taken := sorted(ours & {node.node_id for node in answer.body.nodes}):
        raise SetupError(
            f"slipstream serve: --join: {taken[0]} is in that cluster already, with the model "
            f"{layout.model_name}; give this one another --served-model-name, or end the other"
        )


def _http_ports(config: ServeConfig) -> list[int]:
    """Of a cluster that is joined, one is enough."""
    return [config.port + index for index in range(1 if config.join else config.frontend)]


async def _supervise(layout: Layout, model: Model, screen: Screen, started: float) -> int:
    supervisor = Supervisor(plan(layout), screen.child, layout.run_dir, layout.config.watchdog_s)
    signalled = asyncio.Event()
    _on_signals(supervisor, signalled, screen)
    supervisor.start()
    failure: Failure | None = None
    try:
        failure = await _until_ready(layout, supervisor, signalled, screen, started)
        if failure is None and not signalled.is_set():
            failure = await _until_over(layout, signalled)
    finally:
        drain_s = layout.config.drain_timeout_s if supervisor.ready else 0.5
        if supervisor.ready:
            limit = f"running requests have {drain_s:g} s to finish"
            screen.phase(f"stopping: {limit}; Ctrl-C again ends them")
        await supervisor.stop(STOP_ORDER, drain_s)
        screen.settle()
    if failure is not None:
        print(failure, file=sys.stderr, flush=True)  # the last line on the screen
        return failure.exit_code
    return 0


async def _until_over(layout: Layout, signalled: asyncio.Event) -> Failure | None:
    """A signal; or the end of the cluster that was joined: without its scheduler nobody asks us."""
    while layout.config.join and is_alive(layout.run_dir):
        with suppress(TimeoutError):
            await asyncio.wait_for(signalled.wait(), JOINED_LOOK_S)
            return None
    if layout.config.join:
        return Failure(
            f"slipstream serve: the cluster that was joined, {layout.run_dir}, has ended",
            ExitCode.FAILED,
        )
    await signalled.wait()
    return None


def _on_signals(supervisor: Supervisor, signalled: asyncio.Event, screen: Screen) -> None:
    first_s = 0.0

    def stop() -> None:
        nonlocal first_s
        if not signalled.is_set():
            first_s = loop.time()
            signalled.set()
        elif loop.time() - first_s >= SECOND_SIGNAL_S:
            supervisor.kill_now()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)


async def _until_ready(
    layout: Layout,
    supervisor: Supervisor,
    signalled: asyncio.Event,
    screen: Screen,
    started: float,
) -> Failure | None:
    """None once READY is on the screen, or if a signal came first."""
    config = layout.config
    services = [child.spec for child in supervisor.children if child.spec.role != REDIS]
    expected = [spec.node_id for spec in services if spec.role != "scheduler"]
    last_phase = "waiting for " + ", ".join(expected)

    def phase(text: str) -> None:
        nonlocal last_phase
        last_phase = text
        screen.phase(text)

    asked = until_ready(config.host, _http_ports(config), layout.model_name, expected, phase)
    polling = asyncio.create_task(asked)
    signal_task = asyncio.create_task(signalled.wait())
    first: set[asyncio.Future[Any]] = {polling, signal_task, supervisor.failed}
    await asyncio.wait(first, timeout=config.ready_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    signal_task.cancel()
    if polling.done():
        supervisor.ready = True
        screen.block(_block(layout, supervisor, polling.result(), time.monotonic() - started))
        return None
    polling.cancel()
    if supervisor.failed.done():
        return supervisor.failed.result()
    if signalled.is_set():
        return None
    return Failure(
        f"slipstream serve: not ready after {config.ready_timeout_s:g} s: {last_phase}; "
        "give it longer by --ready-timeout-s, or see what it printed above",
        ExitCode.FAILED,
    )


def _block(layout: Layout, supervisor: Supervisor, readyz: Readyz, seconds: float) -> list[str]:
    config = layout.config
    redis = "none"
    if layout.private_redis:
        redis = (
            f"{redis_binary('redis-cli', layout.environ) or 'redis-cli'} -s {layout.redis_socket}"
        )
    elif config.redis_url:
        redis = "as given by --redis-url"
    elif config.join:
        redis = "of the cluster that was joined"
    return ready_block(
        readyz,
        url=f"http://{reachable(config.host)}:{config.port}",
        model=layout.model_name,
        folder=str(layout.model),
        pids={"serve": os.getpid(), **supervisor.pids()},
        transports=config.transports,
        redis=redis,
        run_dir=str(layout.run_dir),
        seconds=seconds,
        asks_for_keys=bool(config.api_keys_file),
    )
