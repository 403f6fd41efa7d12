"""The index in Redis: a hint that may be lost, late or wrong, and never an error.

    w:{worker}             hash  epoch, last_seq, layout; lapses unless it is renewed
    kvb:{layout}:{hash}    hash  worker -> "epoch:tier"
    kvw:{worker}:{epoch}   set   the kvb keys with an entry of this epoch, to remove them by
    kve:{worker}           set   epochs that have a kvw, to sweep the dead ones

`last_seq` is there only while all events up to it are applied. A replacement takes many short
scripts, so that lookups need not wait for it; meanwhile the hash has `writer` instead, and whoever
begins a replacement later takes it away.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from slipstream.core.machine import (
    Effect,
    Event,
    StoreAlive,
    StoreApply,
    StoreDone,
    StoreFind,
    StoreForget,
    StoreReplace,
)
from slipstream.kvindex import scripts
from slipstream.types import BlockHash, Epoch, NodeId

CONNECTIONS = 16
KEYS_PER_SCRIPT = 500

_LOG = logging.getLogger(__name__)
_Key = bytes


class RedisStore:
    """Executor of kvindex. Every operation ends as one `StoreDone`, failed ones with `ok` false."""

    def __init__(self, url: str, timeout_s: float, worker_ttl_s: float):
        """Connects when first used. ValueError: the URL is malformed."""
        self._ttl_ms = max(1, round(worker_ttl_s * 1000))
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self._redis: Redis = Redis(connection_pool=pool)
        register = self._redis.register_script
        self._write, self._begin = register(scripts.WRITE), register(scripts.BEGIN)
        self._find_script, self._alive = register(scripts.FIND), register(scripts.ALIVE)
        self._forget_script, self._sweep = register(scripts.FORGET), register(scripts.SWEEP)
        self._post: Callable[[Event], None] = lambda event: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._dead: dict[tuple[NodeId, Epoch], None] = {}
        """Epochs to sweep, in order; the first is under way."""
        self._up = True

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
            case StoreAlive(worker, epoch):
                self._spawn(self._alive([f"w:{worker}"], [epoch, self._ttl_ms]))
            case StoreForget(worker, epoch):
                self._spawn(self._forget(worker, epoch))
            case _:
                raise TypeError(f"a store does not execute {type(effect).__name__}")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    async def idle(self) -> None:
        """Waits until nothing is under way, sweeping included."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    # --- Operations -------------------------------------------------------------------------------

    async def _apply(self, effect: StoreApply) -> StoreDone:
        """All in one script: the check of `seq` and what depends on it must not come apart."""
        applied = await self._written(
            effect,
            ("last_seq", effect.seq - 1),
            [_key(effect.kv_layout_id, block_hash) for block_hash in effect.removed],
            [_key(effect.kv_layout_id, block_hash) for block_hash in effect.stored],
            effect.seq,
        )
        return StoreDone(effect.op_id, ok=True, gap=not applied)

    async def _replace(self, effect: StoreReplace) -> StoreDone:
        """Removes what is too much, adds everything, and last of all sets `last_seq`."""
        worker, epoch = effect.worker, effect.epoch
        epochs = await self._begin(
            [f"w:{worker}", f"kve:{worker}"],
            [epoch, effect.kv_layout_id, effect.op_id, self._ttl_ms],
        )
        if epochs is None:
            return StoreDone(effect.op_id, ok=True, gap=True)
        self._sweep_soon(worker, (int(each) for each in epochs if int(each) < epoch))
        stored = {_key(effect.kv_layout_id, block_hash) for block_hash in effect.stored}
        held = {
            key
            async for key in self._redis.sscan_iter(f"kvw:{worker}:{epoch}", count=KEYS_PER_SCRIPT)
        }
        guard = ("writer", effect.op_id)
        written = True
        for keys in _chunks(sorted(held - stored)):
            written = written and await self._written(effect, guard, keys, [], None)
        for keys in _chunks(sorted(stored)):
            written = written and await self._written(effect, guard, [], keys, None)
        written = written and await self._written(effect, guard, [], [], effect.seq)
        return StoreDone(effect.op_id, ok=True, gap=not written)

    async def _find(self, effect: StoreFind) -> StoreDone:
        if not effect.hashes:
            await self._redis.ping()
            return StoreDone(effect.op_id, ok=True)
        keys = [_key(effect.kv_layout_id, block_hash) for block_hash in effect.hashes]
        holders: list[dict[NodeId, Epoch]] = []
        for entries in await self._find_script([], keys):
            holders.append(_holders(entries) if entries else holders[-1])
        return StoreDone(effect.op_id, ok=True, holders=tuple(holders))

    async def _forget(self, worker: NodeId, epoch: Epoch) -> None:
        epochs = await self._forget_script([f"w:{worker}", f"kve:{worker}"], [epoch])
        self._sweep_soon(worker, (int(each) for each in epochs if int(each) <= epoch))

    async def _written(
        self,
        effect: StoreApply | StoreReplace,
        guard: tuple[str, object],
        removed: Sequence[_Key],
        stored: Sequence[_Key],
        last_seq: int | None,
    ) -> bool:
        """False if the guard did not hold; nothing was written then."""
        seq = "" if last_seq is None else last_seq
        words: list[Any] = [effect.epoch, *guard, seq, self._ttl_ms, effect.worker, len(removed)]
        keys = [f"w:{effect.worker}", f"kvw:{effect.worker}:{effect.epoch}"]
        return bool(await self._write(keys, [*words, *removed, *stored]))

    # --- Sweeping ---------------------------------------------------------------------------------

    def _sweep_soon(self, worker: NodeId, epochs: Iterable[Epoch]) -> None:
        idle = not self._dead
        self._dead |= {(worker, epoch): None for epoch in sorted(epochs)}
        if idle and self._dead:
            self._spawn(self._sweep_all())

    async def _sweep_all(self) -> None:
        """In small bites. What is left after an error is found at the worker's next beginning."""
        try:
            while self._dead:
                worker, epoch = next(iter(self._dead))
                keys = [f"w:{worker}", f"kvw:{worker}:{epoch}", f"kve:{worker}"]
                while await self._sweep(keys, [epoch, worker, KEYS_PER_SCRIPT]):
                    pass
                del self._dead[worker, epoch]
        finally:
            self._dead.clear()

    # --- Tasks ------------------------------------------------------------------------------------

    def _answer(self, op_id: str, operation: Coroutine[Any, Any, StoreDone]) -> None:
        async def run() -> None:
            done = StoreDone(op_id, ok=False)
            try:
                done = await self._guarded(operation) or done
            finally:
                self._post(done)

        self._keep(run())

    def _spawn(self, operation: Coroutine[Any, Any, object]) -> None:
        self._keep(self._guarded(operation))

    def _keep(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, operation: Coroutine[Any, Any, StoreDone | object]) -> Any:
        """The operation's result, None if it failed. Says once when Redis goes, and comes back."""
        try:
            result = await operation
        except (RedisError, OSError, TimeoutError) as error:
            if self._up:
                _LOG.warning("Redis does not answer, placement goes without the index: %s", error)
            self._up = False
            return None
        except Exception:  # noqa: BLE001 a hint is not worth a process
            _LOG.exception("index operation failed")
            return None
        if not self._up:
            _LOG.info("Redis answers again")
        self._up = True
        return result


def _key(kv_layout_id: str, block_hash: BlockHash) -> _Key:
    return b"kvb:" + kv_layout_id.encode() + b":" + block_hash


def _chunks(keys: Sequence[_Key]) -> list[Sequence[_Key]]:
    return [keys[i : i + KEYS_PER_SCRIPT] for i in range(0, len(keys), KEYS_PER_SCRIPT)]


def _holders(entries: Sequence[bytes]) -> dict[NodeId, Epoch]:
    """Field, value, field, value … of one kvb hash. What is not ours to read is passed over."""
    found: dict[NodeId, Epoch] = {}
    for worker, value in zip(entries[::2], entries[1::2], strict=True):
        epoch, _, _ = value.partition(b":")
        if epoch.isdigit():
            found[worker.decode(errors="replace")] = int(epoch)
    return found
