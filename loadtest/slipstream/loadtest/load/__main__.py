"""A load test from one command: `python -m slipstream.loadtest.load [--scenario NAME] …`.

Starts `slipstream serve` with the demo model on a free port, runs locust against it, ends it, and
leaves a report. --url takes a server that runs instead. All other options are locust's, those of
the load among them: `--scenario`, `--phase-s`, `--ttft-target-s`; --help shows them all.
"""

import argparse
import asyncio
import datetime
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import uvloop

from slipstream.loadtest.load.settings import Settings, add_arguments
from slipstream.loadtest.versus.errors import PeerMissing
from slipstream.loadtest.versus.server import Launch, Program, free_ports, running

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
STOP_TIMEOUT_S = 20.0


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and the words for locust."""
    parser = argparse.ArgumentParser(prog="load", description=__doc__, allow_abbrev=False)
    parser.add_argument("--url", default="", help="of a server that runs, without /v1")
    parser.add_argument("--serve", default="", help="flags for `slipstream serve`, in one word")
    add_arguments(parser)
    ours, others = parser.parse_known_args(words)
    now = datetime.datetime.now(datetime.UTC)
    ours.report_dir = ours.report_dir or f"build/load/{now:%Y%m%d-%H%M%S}-{ours.scenario}"
    fields = Settings.__struct_fields__
    own = [f"--{name.replace('_', '-')}={getattr(ours, name)}" for name in fields]
    return ours, [*own, *others]


def launch(ttft_target_s: float, flags: list[str]) -> Launch:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "slipstream.cli.main", "serve", "--port", str(port)]
    command += ["--ttft-target-s", f"{ttft_target_s:g}", *flags]
    return Launch([Program(command, f"{url}/readyz")], url)


async def locust(url: str, words: list[str]) -> int:
    """Its exit code. It ends when we are cancelled, and still writes what it has."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]
    command += ["--headless", "--only-summary", "--host", url, *words]
    # A session of its own: Ctrl-C is ours, and we say when it ends.
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # of SIGTERM locust dies without its listeners
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def run(ours: argparse.Namespace, words: list[str]) -> int:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    if ours.url:
        return await locust(ours.url.rstrip("/"), words)
    log = Path(ours.report_dir) / "server.log"
    print(f"slipstream serve starts; its output: {log}", flush=True)
    # The server goes by a prediction, the verdict by the slowest of a hundred.
    async with running(launch(ours.ttft_target_s, shlex.split(ours.serve)), log) as server:
        print(f"ready after {server.start_s:.1f} s: {server.url}", flush=True)
        return await locust(server.url, words)


def main() -> int:
    ours, words = parse(sys.argv[1:])
    try:
        return uvloop.run(run(ours, words))
    except PeerMissing as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
