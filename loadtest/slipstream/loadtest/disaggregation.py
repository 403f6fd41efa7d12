"""Prefill and decode apart against one pool, on real processes: `python -m
slipstream.loadtest.disaggregation`. Target P9: with `auto`, throughput on short prompts at least
0.95 of the pool's, and the 99th percentile of the time between tokens on long prompts at most half.

All have two workers with one thread each. The pools are balanced by load, as aggregated servers
are: our prices would keep long prompts away from streams there too. One is tuned for short gaps, by
steps that take in fewer tokens of a prompt. Short: a closed loop. Long: so many streams run at any
time, and long prompts come in at fixed times, the same for all; what comes before `--warm-up-s` is
not counted, for roles shift to the load.
"""

import argparse
import asyncio
import itertools
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

POOL = ["--prefill", "0", "--decode", "2", "--disaggregation", "never", "--policy", "load"]
STACKS = {
    "pool": POOL,
    "pool-128": [*POOL, "--prefill-budget-tokens", "128"],
    "auto": ["--prefill", "1", "--decode", "1", "--disaggregation", "auto"],
}


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str, model: str):
        self.session, self.url, self.model = session, url, model
        self.tokens = 0
        self.gaps_s: list[float] = []
        self.ttft_s: list[float] = []

    async def stream(self, prompt: list[int], max_tokens: int, counted_s: float = 0.0) -> None:
        """One answer; its times are counted from this moment on."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        last_s = begin_s = time.perf_counter()
        first = True
        async with self.session.post(f"{self.url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.content:
                if not line.startswith(b'data: {"'):
                    continue
                now_s = time.perf_counter()
                if now_s >= counted_s:
                    self.tokens += 1
                    (self.ttft_s if first else self.gaps_s).append(now_s - last_s)
                first, last_s = False, now_s
        assert last_s > begin_s


def prompt(number: int, length: int) -> list[int]:
    return [(7919 * (index + 1) * (number + 3)) % 40_000 + 200 for index in range(length)]


async def short(client: Client, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of a closed loop."""
    numbers = iter(range(arguments.requests))

    async def loop() -> None:
        for number in numbers:
            await client.stream(prompt(number, 64), 64)

    begin_s = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(arguments.concurrency)))
    elapsed_s = time.perf_counter() - begin_s
    return {"tokens_per_s": client.tokens / elapsed_s, **_times(client)}


async def long(client: Client, arguments: argparse.Namespace) -> dict[str, float]:
    """Times between the tokens of streams while long prompts come in."""
    begin_s = time.perf_counter()
    counted_s = begin_s + arguments.warm_up_s
    end_s = counted_s + arguments.long_s
    numbers = itertools.count()

    async def streams() -> None:
        while time.perf_counter() < end_s:
            await client.stream(prompt(1000 + next(numbers), 64), 120, counted_s)

    async def intrude() -> None:
        await client.stream(prompt(50_000 + next(numbers), arguments.prompt_tokens), 8, end_s * 2)

    running = [asyncio.create_task(streams()) for _ in range(arguments.streams)]
    while time.perf_counter() < end_s:
        running.append(asyncio.create_task(intrude()))
        await asyncio.sleep(arguments.period_s)
    await asyncio.gather(*running)
    return _times(client)


def _times(client: Client) -> dict[str, float]:
    assert client.gaps_s and client.ttft_s, "no stream began after the warm-up"
    gaps = statistics.quantiles(client.gaps_s, n=100)
    return {
        "itl_p50_ms": gaps[49] * 1e3,
        "itl_p99_ms": gaps[98] * 1e3,
        "ttft_p50_ms": statistics.median(client.ttft_s) * 1e3,
    }


@asynccontextmanager
async def serving(flags: list[str], port: int, run_dir: str) -> Any:
    command = [sys.executable, "-m", "slipstream.cli.main", "serve", "--port", str(port)]
    command += ["--run-dir", run_dir, "--threads", "1", "--max-model-len", "4096", *flags]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def measure(
    flags: list[str],
    port: int,
    load: Callable[[Client, Any], Awaitable[dict[str, float]]],
    arguments: Any,
) -> dict[str, float]:
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as run_dir:
        async with serving(flags, port, run_dir), aiohttp.ClientSession() as session:
            model = await _model(session, url)
            for number in range(4):  # prices and transports are learnt
                await Client(session, url, model).stream(prompt(5000 + number, 600), 16)
            return await load(Client(session, url, model), arguments)


async def _model(session: aiohttp.ClientSession, url: str) -> str:
    deadline_s = time.monotonic() + 120
    while True:
        try:
            async with session.get(f"{url}/readyz") as reply:
                if reply.status == 200:
                    break
        except aiohttp.ClientError:
            pass
        assert time.monotonic() < deadline_s, "not ready in time"
        await asyncio.sleep(0.2)
    async with session.get(f"{url}/v1/models") as reply:
        return str((await reply.json())["data"][0]["id"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="disaggregation", description=__doc__)
    parser.add_argument("--port", type=int, default=18_400)
    parser.add_argument("--rounds", type=int, default=2, help="of all, in turn")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--warm-up-s", type=float, default=25.0)
    parser.add_argument("--long-s", type=float, default=40.0)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--period-s", type=float, default=4.0)
    arguments = parser.parse_args()
    for name, load, number, aim in (
        ("short prompts", short, "tokens_per_s", "at least 0.95"),
        ("long prompts", long, "itl_p99_ms", "at most 0.5"),
    ):
        found: dict[str, list[float]] = {kind: [] for kind in STACKS}
        for _ in range(arguments.rounds):
            for kind, flags in STACKS.items():
                result = asyncio.run(measure(flags, arguments.port, load, arguments))
                found[kind].append(result[number])
                shown = ", ".join(f"{key} {value:.1f}" for key, value in result.items())
                print(f"{name}, {kind}: {shown}", flush=True)
        median = {kind: statistics.median(values) for kind, values in found.items()}
        for kind in [*STACKS][:-1]:
            ratio = median["auto"] / median[kind]
            print(f"{name}: {number} of auto is {ratio:.2f} of {kind}'s; wanted: {aim}", flush=True)


if __name__ == "__main__":
    main()
