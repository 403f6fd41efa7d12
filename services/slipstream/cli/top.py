"""`slipstream top`: looks at a cluster again and again, and shows what it does."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator

import msgspec

from slipstream.cli.client_config import TopConfig, base_url
from slipstream.cli.run import start_error
from slipstream.cli.top_sample import LATENCIES_OVER_S, Metrics, Sample, read_metrics, view
from slipstream.cli.top_table import table
from slipstream.client.api import OK, Api, ApiError
from slipstream.client.stream import short
from slipstream.errors import ExitCode
from slipstream.frontend.cluster import Cluster

PROG = "slipstream top"
_SAMPLES_MAX = 512
_QUIT = b"q"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _LINE_END, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def top(config: TopConfig) -> int:
    """Until q or Ctrl-C, or for one table. SetupError: `--once`, and nobody answers."""
    alive = not (config.once or config.json) and sys.stdout.isatty()
    try:
        with _terminal(alive):
            return asyncio.run(_Top(config, alive).watch())
    except ApiError as error:
        raise start_error(PROG, error) from None
    except KeyboardInterrupt:
        return ExitCode.OK  # how one leaves it


@contextlib.contextmanager
def _terminal(alive: bool) -> Iterator[None]:
    """A screen of its own, and keys as they are pressed; all as before at the end."""
    if not alive:
        yield
        return
    keys = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keys) if keys is not None else None
    sys.stdout.write(_ENTER)
    try:
        if keys is not None:
            tty.setcbreak(keys)
        yield
    finally:
        if keys is not None and before is not None:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


class _Top:
    def __init__(self, config: TopConfig, alive: bool) -> None:
        self._config, self._alive = config, alive
        self._url = base_url(config.url)
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES_MAX)
        self._lines: list[str] = []
        self._over = asyncio.Event()

    async def watch(self) -> int:
        for number in (signal.SIGTERM, signal.SIGHUP):  # else the terminal would stay as it is now
            asyncio.get_running_loop().add_signal_handler(number, self._over.set)
        async with Api(self._url, self._config.api_key) as api:
            with self._keys():
                while not self._over.is_set():
                    await self._look(api)
                    if self._config.once and len(self._samples) > 1:
                        break
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._over.wait(), self._config.interval_s)
        return ExitCode.OK

    async def _look(self, api: Api) -> None:
        try:
            cluster = await api.ask("/cluster", Cluster)
            metrics = await _metrics(api)
        except ApiError as error:
            if self._config.once:
                raise
            self._gone(error)
            return
        samples, sample = self._samples, Sample(time.monotonic(), cluster, metrics)
        while samples and samples[0].at_s < sample.at_s - 2 * LATENCIES_OVER_S:
            samples.popleft()
        samples.append(sample)
        if not self._config.once or len(samples) > 1:
            self._show()

    def _show(self) -> None:
        seen = view(self._samples)
        if self._config.json:
            print(msgspec.json.encode(seen).decode(), flush=True)
            return
        width = shutil.get_terminal_size((80, 24)).columns if self._alive else 200
        self._lines = table(seen, self._url, width)
        self._draw(self._lines)

    def _gone(self, error: ApiError) -> None:
        line = f"{error}; trying again every {self._config.interval_s:g} s"
        if self._alive:
            self._draw([line, "", *self._lines])
        else:
            print(f"{PROG}: {line}", file=sys.stderr, flush=True)

    def _draw(self, lines: list[str]) -> None:
        if not self._alive:
            print("\n".join([*lines, ""]), flush=True)
            return
        size = shutil.get_terminal_size((80, 24))
        foot = time.strftime("%H:%M:%S") + "  q quits"
        whole = [*lines[: size.lines - 2], ""][: size.lines - 1]
        # In one write, each line over what stood there: nothing is blank in between.
        full = "".join(line[: size.columns].ljust(size.columns) + "\n" for line in whole)
        sys.stdout.write(_HOME + full + foot[: size.columns - 1] + _LINE_END + _REST)
        sys.stdout.flush()

    @contextlib.contextmanager
    def _keys(self) -> Iterator[None]:
        if not (self._alive and sys.stdin.isatty()):
            yield
            return
        loop, keys = asyncio.get_running_loop(), sys.stdin.fileno()

        def pressed() -> None:
            if _QUIT in os.read(keys, 64):
                self._over.set()

        loop.add_reader(keys, pressed)
        try:
            yield
        finally:
            loop.remove_reader(keys)


async def _metrics(api: Api) -> Metrics:
    raw = await api.read("/metrics")
    try:
        return read_metrics(raw.decode("utf-8", "replace"))
    except ValueError:
        said = f"{api.url}/metrics is not Prometheus' text: {short(raw)}"
        raise ApiError(said, OK) from None
