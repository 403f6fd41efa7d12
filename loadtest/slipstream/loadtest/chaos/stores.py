"""Scenarios: a Redis and an index that die, hang, lag, forget and lie. None of it is to be seen by
a client."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from redis import Redis

from slipstream.core.prefix import HASH_BYTES
from slipstream.loadtest.chaos.field import Field, Scenario
from slipstream.loadtest.chaos.proxy import Proxy

DWELL_S = 4.0
"""How long the load goes on with the fault."""
REDIS_LATENCY_S = 0.5


def blow(node_id: str, number: signal.Signals = signal.SIGKILL) -> Scenario:
    """From a SIGSTOP it goes on after a while."""

    async def scenario(field: Field) -> None:
        await field.streaming()
        if number is signal.SIGSTOP:
            await field.stand_still(node_id, DWELL_S)
        else:
            field.strike(node_id, number)
            await asyncio.sleep(DWELL_S)

    return scenario


def spoil(how: Callable[[Redis], None]) -> Scenario:
    """Its contents, once there are some."""

    async def scenario(field: Field) -> None:
        with client(field) as redis:
            await field.until_asked(lambda: list(redis.scan_iter("kvw:*")), "an index")
            await field.streaming()
            field.mark()
            await asyncio.to_thread(how, redis)
            await asyncio.sleep(DWELL_S)

    return scenario


def flush(redis: Redis) -> None:
    redis.flushall()


def wrong_types(redis: Redis) -> None:
    for number, key in enumerate(_keys(redis)):
        redis.delete(key)
        if number % 2:
            redis.set(key, "garbage")
        else:
            redis.rpush(key, "gar", "bage")


def lies(redis: Redis) -> None:
    """Each worker is said to have what any has, and what nobody has."""
    entries: dict[Any, Any] = {bytes([n] * HASH_BYTES): b"0" for n in range(64)}
    for key in _keys(redis):
        fields: dict[bytes, bytes] = redis.hgetall(key)  # type: ignore[assignment]
        entries |= {name: b"0" for name in fields if len(name) == HASH_BYTES}
    for key in _keys(redis):
        redis.hset(key, mapping=entries)


async def read_only(field: Field) -> None:
    """It is made a replica of nobody: it answers, and takes no writes."""
    with client(field) as redis:
        await field.streaming()
        field.mark()
        redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        await asyncio.sleep(DWELL_S)
        redis.execute_command("REPLICAOF", "NO", "ONE")


async def slow(field: Field) -> None:
    async with _behind(field) as proxy:
        proxy.latency_s = REDIS_LATENCY_S
        await asyncio.sleep(DWELL_S)


async def half_open(field: Field) -> None:
    """The way to Redis is silent and stays open."""
    async with _behind(field) as proxy:
        proxy.silent_up = proxy.silent_down = True
        await asyncio.sleep(DWELL_S)


async def stale(field: Field) -> None:
    """Prefill workers begin anew; Redis still tells what their predecessors had."""
    await field.streaming()
    for victim in ("prefill-0", "prefill-1"):
        epoch = await field.epoch(victim)
        field.strike(victim)
        for _ in range(3):
            field.send("shared prefix", cache_salt="warm")
        await field.back(victim, epoch)


@contextlib.contextmanager
def client(field: Field) -> Any:
    with Redis(unix_socket_path=str(_socket(field))) as redis:
        yield redis


@contextlib.asynccontextmanager
async def _behind(field: Field) -> AsyncGenerator[Proxy]:
    """A proxy in the place of Redis' socket; all its clients come through it."""
    path = _socket(field)
    away = path.with_suffix(".away")
    path.rename(away)
    try:
        async with Proxy(path, away) as proxy:
            with Redis(unix_socket_path=str(away)) as redis:
                redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await field.until(lambda: proxy.bytes_passed, "the index comes by the proxy")
            field.mark()
            yield proxy
    finally:
        path.unlink(missing_ok=True)
        away.rename(path)


def _socket(field: Field) -> Path:
    return field.stack.run_dir / "redis.sock"


def _keys(redis: Redis) -> list[bytes]:
    return list(redis.scan_iter("kvw:*"))
