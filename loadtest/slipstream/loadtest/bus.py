"""What the processes around a model cost: `python -m slipstream.loadtest.bus`.

Target P6: they add at most 3 ms to the time to the first token, in the median with one request at a
time; one frontend and one tokenizer stream at least 15,000 tokens/s, an SSE event for each.

Starts the processes of `slipstream serve`, with a worker that computes nothing (`fake_worker`).
  added TTFT  (the worker begins the prompt's step - the client has sent its request)
              + (the client has the first event - the step is over), all on this host's one clock
  tokens/s    streams run in a closed loop; the client (this process) counts their events
  us/token    CPU time of each process for one token; 1e6 / it: what it could stream on a core of
              its own
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import uvloop

from slipstream.cli.config import ServeConfig
from slipstream.cli.plan import ChildSpec, Layout, plan
from slipstream.cli.ready import ask
from slipstream.loadtest import first_token
from slipstream.loadtest.fake_worker import TEXT
from slipstream.loadtest.sse_client import Connection, Counted, connect, post
from slipstream.types import Role

READY_S = 60.0
STAMPS = "stamps"
RECORDINGS = "recordings"
FIRST_TOKENS = 8
"""Of an answer whose first token is waited for."""


class Stack:
    """The processes, and what they have used of the CPUs."""

    def __init__(self, folder: Path, children: list[ChildSpec]):
        self.stamps, self.recordings = folder / STAMPS, folder / RECORDINGS
        self._folder, self._children = folder, children
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for child in self._children:
            log = (self._folder / f"{child.node_id}.log").open("wb")
            with log:
                self._processes[child.node_id] = subprocess.Popen(
                    child.argv, env=child.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )

    def wait(self, port: int) -> None:
        deadline_s = time.monotonic() + READY_S
        while not ask("127.0.0.1", port).ready:
            for name, process in self._processes.items():
                log = self._folder / f"{name}.log"
                assert process.poll() is None, f"{name} has ended:\n{log.read_text()}"
            assert time.monotonic() < deadline_s, f"not ready after {READY_S:g} s"
            time.sleep(0.1)

    def cpu_s(self) -> dict[str, float]:
        """User and system time so far, by process; the client's as `client`."""
        pids = {name: process.pid for name, process in self._processes.items()}
        return {name: _cpu_s(pid) for name, pid in {**pids, "client": os.getpid()}.items()}

    def close(self) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _cpu_s(pid: int) -> float:
    """Of all its threads, to the ns."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9


@contextlib.contextmanager
def stack(arguments: argparse.Namespace, step_ms: float) -> Iterator[Stack]:
    """Ready to serve."""
    prepare = [sys.executable, "-m", "slipstream.cli.main", "model", "prepare", arguments.model]
    model = subprocess.run(prepare, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    settings = ServeConfig(
        port=arguments.port,
        prefill=0,
        kvindex=arguments.kvindex,
        max_num_seqs=1024,
        prefill_budget_tokens=1 << 20,
        log_level="warning",
    )
    given = {"max_num_seqs", "prefill_budget_tokens", "log_level"}
    with tempfile.TemporaryDirectory(prefix="slip-bus-") as name:
        folder = Path(name)
        if arguments.legs:
            settings = msgspec.structs.replace(settings, record=str(folder / RECORDINGS))
            given.add("record")
        layout = Layout(
            config=settings,
            given=given,
            config_file="",
            model=Path(model),
            model_name="fake",
            run_dir=folder,
            environ={},  # settings of a server that runs here are not for these processes
        )
        fake = ("--step-ms", str(step_ms), "--stamps", str(folder / STAMPS))
        children = [
            msgspec.structs.replace(
                child,
                argv=(sys.executable, "-m", "slipstream.loadtest.fake_worker", *fake, *child.flags),
            )
            if child.role == Role.DECODE
            else child
            for child in plan(layout)
        ]
        running = Stack(folder, children)
        try:
            running.start()
            running.wait(arguments.port)
            yield running
        finally:
            running.close()


def request(api: str, tokens: int, number: int) -> bytes:
    """`number`: so that no two prompts begin alike."""
    body: dict[str, object] = {"model": "fake", "max_tokens": tokens, "ignore_eos": True}
    body |= {"stream": True, "temperature": 0}
    text = f"{number}. {TEXT}"
    if api == "chat":
        content = [{"role": "user", "content": text}]
        return post("/v1/chat/completions", body | {"messages": content})
    return post("/v1/completions", body | {"prompt": text})


@contextlib.asynccontextmanager
async def connected(port: int, count: int, counted: Counted) -> AsyncIterator[list[Connection]]:
    connections = [await connect(port, counted) for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


async def first_tokens(arguments: argparse.Namespace, running: Stack) -> None:
    """Requests one after another: what was added before and after the model's step."""
    before_ms, after_ms, spans_s = [], [], []
    async with connected(arguments.port, 1, Counted()) as (connection,):
        for number in range(arguments.requests + arguments.warm_up):
            if number == arguments.warm_up:
                cpu_s = running.cpu_s()
            sent_s = await connection.stream(request(arguments.api, FIRST_TOKENS, number))
            line = running.stamps.read_bytes().splitlines()[-1]
            begun_s, over_s = map(float, line.split())
            if number >= arguments.warm_up:
                before_ms.append((begun_s - sent_s) * 1e3)
                after_ms.append((connection.first_s - over_s) * 1e3)
                spans_s.append((sent_s, connection.first_s))
            await asyncio.sleep(arguments.pause_ms / 1e3)
    added_ms = [sum(pair) for pair in zip(before_ms, after_ms, strict=True)]
    how = ", recorded" if arguments.legs else ""
    print(f"added TTFT, one request at a time ({arguments.requests}{how}): {_spread(added_ms)}")
    print(f"  request sent to step begun: {_spread(before_ms)}")
    print(f"  step over to first event:   {_spread(after_ms)}")
    used_us = {name: (now_s - cpu_s[name]) * 1e6 for name, now_s in running.cpu_s().items()}
    shares = [f"{name} {us / arguments.requests:.0f}" for name, us in used_us.items()]
    print(f"  CPU us/request of {FIRST_TOKENS} tokens: {', '.join(shares)}", flush=True)
    if arguments.legs:
        print(
            first_token.table(first_token.legs_ms(first_token.passed(running.recordings), spans_s))
        )


def _spread(values_ms: list[float]) -> str:
    quantiles = statistics.quantiles(values_ms, n=100)
    return f"p10 {quantiles[9]:.2f}, median {quantiles[49]:.2f}, p99 {quantiles[98]:.2f} ms"


async def throughput(arguments: argparse.Namespace, running: Stack, streams: int) -> None:
    counted = Counted()
    numbers = iter(range(1 << 30))
    ends_s = time.monotonic() + 1.0 + arguments.seconds
    opening = arguments.api == "chat"  # the event that names the role

    async def loop(connection: Connection) -> None:
        while time.monotonic() < ends_s:
            await connection.stream(request(arguments.api, arguments.tokens, next(numbers)))
            expected = arguments.tokens + opening + 1  # and [DONE]
            assert connection.events == expected, f"{connection.events} events, not {expected}"

    async with connected(arguments.port, streams, counted) as connections:
        loops = [asyncio.create_task(loop(connection)) for connection in connections]
        await asyncio.sleep(1.0)
        begin_s, events, cpu_s = time.monotonic(), counted.events, running.cpu_s()
        await asyncio.sleep(arguments.seconds)
        elapsed_s = time.monotonic() - begin_s
        tokens = (counted.events - events) * arguments.tokens / (arguments.tokens + opening + 1)
        used_s = {name: now_s - cpu_s[name] for name, now_s in running.cpu_s().items()}
        await asyncio.gather(*loops)
    print(f"{streams} streams of {arguments.tokens}: {tokens / elapsed_s:.0f} tokens/s")
    for name, seconds in sorted(used_s.items(), key=lambda pair: -pair[1]):
        if seconds / elapsed_s > 0.005:
            us = seconds / tokens * 1e6
            print(
                f"  {name:13} {seconds / elapsed_s:4.0%} of a core, {us:5.1f} us/token", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bus", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=18_500)
    parser.add_argument("--model", default="demo", help="its tokenizer is all that is used")
    parser.add_argument("--api", choices=("chat", "completions"), default="chat")
    parser.add_argument("--kvindex", type=int, default=1)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=30)
    parser.add_argument("--pause-ms", type=float, default=10.0, help="between two requests")
    legs = "record all processes, and show where the time to a first token goes; no streams then"
    parser.add_argument("--legs", action="store_true", help=legs)
    parser.add_argument("--streams", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--step-ms", type=float, default=0.0, help="of the fake model")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    arguments = parser.parse_args()
    with stack(arguments, arguments.step_ms) as running:
        if arguments.requests:
            uvloop.run(first_tokens(arguments, running))
        for streams in () if arguments.legs else arguments.streams:
            uvloop.run(throughput(arguments, running, streams))


if __name__ == "__main__":
    main()
