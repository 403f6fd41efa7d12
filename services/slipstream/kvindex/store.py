"""The index in Redis: a hint that may be lost, late or wrong, and never an error.

    kvw:{s}:{worker}     hash  epoch, seq, and block hash -> tier for every block of the worker;
                               lapses unless it is renewed
    kvn:{s}:{worker}:…   hash  a replacement while it is written; then it takes the other's place

`s`, in braces that Redis knows as a hash tag, is one of `SHARDS` numbers, by the worker's name: on
a Cluster the keys of one script have to lie in one slot, and a question goes to each shard once. On
one Redis, where slots mean nothing, it is one script for all workers. `seq` is that of the events
applied last: whoever finds another one there than he left asks for a snapshot.
"""

import asyncio
import logging
import time
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from slipstream.core.machine import (
    Effect,
    Event,
    Held,
    StoreAlive,
    StoreApply,
    StoreDone,
    StoreFind,
    StoreForget,
    StoreReplace,
)
from slipstream.kvindex import scripts
from slipstream.runtime.redis_url import connect, is_cluster
from slipstream.types import NodeId

CONNECTIONS = 16
SHARDS = 16
HASHES_PER_SCRIPT = 2000
"""Of a snapshot: lookups wait for at most so many, about a millisecond."""
FILL_TTL_S = 60.0

_LOG = logging.getLogger(__name__)


class RedisStore:
    """Executor of kvindex. What has an `op_id` ends as one `StoreDone`, failed with `ok` false."""

    def __init__(self, url: str, timeout_s: float, worker_ttl_s: float):
        """Connects when first used. ValueError: the URL is malformed."""
        self._timeout_s = timeout_s
        self._ttl_ms = max(1, round(worker_ttl_s * 1000))
        self._redis = connect(url, timeout_s)
        self._sharded = is_cluster(url)
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._apply_script, self._fill = self._script(scripts.APPLY), self._script(scripts.FILL)
        self._swap, self._find_script = self._script(scripts.SWAP), self._script(scripts.FIND)
        self._alive_script, self._forget = self._script(scripts.ALIVE), self._script(scripts.FORGET)
        self._post: Callable[[Event], None] = lambda event: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._up = True
        self._operations, self._operation_s = 0, 0.0

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post

    def execute(self, effect: Effect) -> None:
        match effect:
            case StoreApply():
                self._answer(effect.op_id, self._apply(effect))
            case StoreReplace():
                self._answer(effect.op_id, self._replace(effect))
            case StoreFind():
                self._answer(effect.op_id, self._find(effect))
            case StoreAlive():
                self._answer(effect.op_id, self._alive(effect))
            case StoreForget(worker, epoch):
                self._keep(self._guarded(self._forget([_key(worker)], [epoch])))
            case _:
                raise TypeError(f"a store does not execute {type(effect).__name__}")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    def statistics(self) -> dict[str, float]:
        """Operations and their seconds, failed ones included."""
        return {
            "store_operations_total": self._operations,
            "store_operation_seconds_total": self._operation_s,
        }

    async def idle(self) -> None:
        """Waits until nothing is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    # --- Operations -------------------------------------------------------------------------------

    async def _apply(self, effect: StoreApply) -> StoreDone:
        """All in one script: the check of `seq` and what depends on it must not come apart."""
        words: list[Any] = [effect.epoch, effect.seq - 1, effect.seq, self._ttl_ms]
        words.append(b"".join(effect.removed))
        for tier, hashes in _tiers(effect):
            words += [tier, b"".join(hashes)]
        applied = await self._apply_script([_key(effect.worker)], words)
        return StoreDone(effect.op_id, ok=True, gap=not applied)

    async def _replace(self, effect: StoreReplace) -> StoreDone:
        """Written beside, in bites, so that lookups need not wait; what was there counts until the
        new takes its place at once."""
        live = _key(effect.worker)
        fresh = f"kvn{live.removeprefix('kvw')}:{effect.op_id}"
        bites = 0
        for tier, hashes in _tiers(effect):
            for first in range(0, len(hashes), HASHES_PER_SCRIPT):
                packed = b"".join(hashes[first : first + HASHES_PER_SCRIPT])
                await self._fill([fresh], [tier, packed, round(FILL_TTL_S * 1000)])
                bites += 1
        words = [effect.epoch, effect.seq, self._ttl_ms, bites]
        swapped = await self._swap([fresh, live], words)
        return StoreDone(effect.op_id, ok=True, gap=not swapped)

    async def _alive(self, effect: StoreAlive) -> StoreDone:
        there = await self._alive_script(
            [_key(effect.worker)], [effect.epoch, effect.seq, self._ttl_ms]
        )
        return StoreDone(effect.op_id, ok=True, gap=not there)

    async def _find(self, effect: StoreFind) -> StoreDone:
        """One script; on a Cluster one for each shard, at the same time."""
        if not effect.workers:
            async with asyncio.timeout(self._timeout_s), self._slots:
                await self._redis.ping()
            return StoreDone(effect.op_id, ok=True)
        shards: defaultdict[int, list[NodeId]] = defaultdict(list)
        for worker in effect.workers:
            shards[_shard(worker) if self._sharded else 0].append(worker)
        packed = b"".join(effect.hashes)
        found = await asyncio.gather(
            *(
                self._find_script(
                    [_key(worker) for worker in workers],
                    [packed, *(effect.workers[worker] for worker in workers)],
                )
                for workers in shards.values()
            ),
            return_exceptions=True,
        )
        errors = [error for error in found if isinstance(error, BaseException)]
        if len(errors) == len(found):
            raise errors[0]
        holders: dict[NodeId, Held] = {}
        for workers, counts in zip(shards.values(), found, strict=True):
            if isinstance(counts, BaseException):
                continue  # a part of a Cluster is down
            for worker, blocks, lower in zip(workers, counts[::2], counts[1::2], strict=True):
                if blocks:
                    holders[worker] = Held(blocks, lower)
        return StoreDone(effect.op_id, ok=True, holders=holders)

    def _script(self, text: str) -> Callable[[Sequence[str], Sequence[Any]], Awaitable[Any]]:
        """(keys, arguments) -> what it returns; given up when its time is over."""
        script = self._redis.register_script(text)

        async def run(keys: Sequence[str], words: Sequence[Any]) -> Any:
            async with asyncio.timeout(self._timeout_s), self._slots:
                return await script(keys, words)

        return run

    # --- Tasks ------------------------------------------------------------------------------------

    def _answer(self, op_id: str, operation: Coroutine[Any, Any, StoreDone]) -> None:
        async def run() -> None:
            done = StoreDone(op_id, ok=False)
            try:
                done = await self._guarded(operation) or done
            finally:
                self._post(done)

        self._keep(run())

    def _keep(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, operation: Awaitable[Any]) -> Any:
        """The operation's result, None if it failed. Says once when Redis goes, and comes back."""
        began_s = time.monotonic()
        try:
            result = await operation
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            if self._up:
                _LOG.warning("Redis does not answer, placement goes without the index: %s", error)
            self._up = False
            return None
        except Exception:  # noqa: BLE001 a hint is not worth a process
            _LOG.exception("index operation failed")
            return None
        finally:
            self._operations += 1
            self._operation_s += time.monotonic() - began_s
        if not self._up:
            _LOG.info("Redis answers again")
        self._up = True
        return result


def _shard(worker: NodeId) -> int:
    return zlib.crc32(worker.encode()) % SHARDS


def _key(worker: NodeId) -> str:
    return f"kvw:{{{_shard(worker)}}}:{worker}"


def _tiers(effect: StoreApply | StoreReplace) -> list[tuple[int, Sequence[bytes]]]:
    """Tier 0 last: what was said to be in two of them is in the pool."""
    tiers = [*sorted(effect.lower.items(), reverse=True), (0, effect.stored)]
    return [(tier, hashes) for tier, hashes in tiers if hashes]
