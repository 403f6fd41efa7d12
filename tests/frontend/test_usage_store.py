"""Usage in a real Redis is kept as the store in memory keeps it; what happens when it is not."""

import asyncio
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from frontend.fakes import until
from frontend.usages import Accounts, MemoryUsage
from kvindex import servers
from kvindex.conftest import RedisServer
from slipstream.cli.config import ServeConfig
from slipstream.cli.plan import Layout, redis_child
from slipstream.frontend import usage_sync
from slipstream.frontend.journal import StoreError
from slipstream.frontend.usage import Account, Kind, Ledger, Used, Write, minute, month
from slipstream.frontend.usage_store import Exchanged, RedisUsage, UsageStore
from slipstream.frontend.usage_sync import ACCOUNTS_PER_SCRIPT, UsageSync

UNIX_S = 1_795_000_000.0
MODELS = ("m", "org/a b\N{SNOWMAN}", "")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="slip-usage-"))
    running = RedisServer(folder)
    yield running
    running.kill()
    shutil.rmtree(folder)


Made = Callable[[str], UsageStore]


@pytest.fixture(params=["redis", "memory"])
async def stores(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[Made]:
    """A frontend's way to the same store, by its name."""
    server.client.flushall()
    accounts, made = Accounts(), list[UsageStore]()

    def make(writer: str) -> UsageStore:
        redis = request.param == "redis"
        made.append(RedisUsage(server.url, writer) if redis else MemoryUsage(accounts, writer))
        return made[-1]

    yield make
    for store in made:
        await store.close()


def account(tenant: str = "a", *, of_minute: bool = False, **counts: int) -> Account:
    found = Account(tenant, (minute if of_minute else month)(UNIX_S))
    for model in MODELS:
        for kind, amount in counts.items():
            found.count(model, Kind[kind], amount)
    return found


async def test_each_hears_the_sum_of_the_others(stores: Made) -> None:
    one, two, three = (stores(f"frontend-{n}.1") for n in range(3))
    mine = account(REQUESTS=1, PROMPT_TOKENS=2**50, COMPLETION_TOKENS=7)
    (said,) = (await one.exchange([mine.write()])).said
    assert said is not None and not said.ours and said.others == {}
    for _ in range(2):  # said again it is no more
        (said,) = (await two.exchange([account(REQUESTS=3, REFUSED=4).write()])).said
        assert said is not None
        assert said.others == {model: [1, 0, 2**50, 0, 7] for model in MODELS}
    assert said.ours
    (said,) = (await three.exchange([account().write()])).said
    assert said is not None and not said.ours
    assert said.others == {model: [4, 4, 2**50, 0, 7] for model in MODELS}
    (said,) = (await one.exchange([mine.write()])).said
    assert said is not None and said.ours and said.others["m"] == [3, 4, 0, 0, 0]


async def test_clients_and_periods_are_apart(stores: Made) -> None:
    one, two = stores("frontend-0.1"), stores("frontend-1.1")
    tenants = ("a", "ab", "", "a.b")
    sizes = range(1, 2 * len(tenants) + 1)
    kinds = [(tenant, of_minute) for tenant in tenants for of_minute in (False, True)]
    writes = [
        account(tenant, of_minute=of_minute, REQUESTS=size).write()
        for (tenant, of_minute), size in zip(kinds, sizes, strict=True)
    ]
    await one.exchange(writes)
    questions = [account(tenant, of_minute=of_minute).write() for tenant, of_minute in kinds]
    found = (await two.exchange(questions)).said
    assert [said and said.others["m"][0] for said in found] == [*sizes]


async def test_a_process_of_the_same_name_is_another_writer(stores: Made) -> None:
    await stores("frontend-0.1").exchange([account(REQUESTS=5).write()])
    (said,) = (await stores("frontend-0.11").exchange([account(REQUESTS=1).write()])).said
    assert said is not None and not said.ours and said.others["m"][0] == 5


# --- Redis alone ----------------------------------------------------------------------------------


async def test_minutes_lapse_and_months_do_not(server: RedisServer) -> None:
    server.client.flushall()
    store = RedisUsage(server.url, "frontend-0.1")
    told = await store.exchange(
        [account(REQUESTS=1).write(), account(of_minute=True, REQUESTS=1).write()]
    )
    seconds, micros = server.client.time()
    assert 0 <= seconds + micros / 1e6 - told.unix_s < 5.0
    now = minute(UNIX_S).name
    assert server.client.hget(f"slu:{{a}}:{now}", "frontend-0.1 m") == b"1 0 0 0 0"
    assert server.client.ttl("slu:{a}:2026-11") == -1
    assert 170 < server.client.ttl(f"slu:{{a}}:{now}") <= 180
    server.client.hset("slu:{gone}:2025-10", "x", "y")
    server.client.hset("slu:{gone}:2025-11", "x", "y")
    await store.forget("2025-11")
    kept = {key.decode() for key in server.client.keys("slu:*:2???-??")}
    assert kept == {"slu:{a}:2026-11", "slu:{gone}:2025-11"}
    await store.close()


async def test_nonsense_under_the_name_harms_nothing_else(server: RedisServer) -> None:
    server.client.flushall()
    server.client.set("slu:{b}:2026-11", "garbage")
    server.client.hset("slu:{a}:2026-11", mapping={"x": "y", "z m": "1 2 three", "w m": "9 " * 99})
    store = RedisUsage(server.url, "frontend-0.1")
    told = await store.exchange(
        [account("b", REQUESTS=1).write(), account("a", REQUESTS=1).write()]
    )
    assert told.said[0] is None and told.said[1] is not None
    assert told.said[1].others == {"m": [10, 11, 9, 9, 9]}
    server.client.hset("slu:{a}:2026-11", "w \xff".encode("latin-1"), "1 1 1 1 1")
    with pytest.raises(StoreError):
        await store.exchange([account("a", REQUESTS=1).write()])
    await store.close()


async def test_months_are_not_evicted(tmp_path: Path) -> None:
    """With the settings of the Redis that `serve` starts, and less memory: journals and index are
    written until others of them have to go."""
    config = ServeConfig(model="m")
    layout = Layout(
        config=config, given=(), config_file="", model=tmp_path, model_name="m",
        run_dir=tmp_path, environ={},
    )  # fmt: skip
    words = redis_child(layout).argv
    policy = words[words.index("--maxmemory-policy") + 1]
    (port,) = servers.free_ports(1)
    redis = servers.Server(tmp_path, port, "--maxmemory", "6mb", "--maxmemory-policy", policy)
    try:
        redis.until_up()
        store = RedisUsage(f"redis://127.0.0.1:{port}/0", "frontend-0.1")
        clients = [account(f"client-{n}", REQUESTS=n + 1) for n in range(50)]
        await store.exchange([one.write() for one in clients])
        for number in range(4000):
            redis.client.set(f"slj:{number}", b"x" * 4096, ex=60)
        assert redis.client.info("stats")["evicted_keys"] > 1000
        found = (await store.exchange([one.write() for one in clients])).said
        assert all(said is not None and said.ours for said in found)
        await store.close()
    finally:
        redis.kill()


async def test_on_a_cluster(tmp_path: Path) -> None:
    with servers.cluster() as nodes:
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        one, two = RedisUsage(url, "frontend-0.1"), RedisUsage(url, "frontend-1.1")
        clients = [f"client-{n}" for n in range(20)]
        await one.exchange(
            [account(name, REQUESTS=n + 1).write() for n, name in enumerate(clients)]
        )
        found = (await two.exchange([account(name).write() for name in clients])).said
        assert [said and said.others["m"][0] for said in found] == list(range(1, 21))
        await one.forget("2026-12")
        found = (await two.exchange([account(name).write() for name in clients])).said
        assert [said and said.others for said in found] == [{}] * 20
        await one.close()
        await two.close()


# --- The exchange ---------------------------------------------------------------------------------


class Sync(UsageSync):
    """With a clock of its own, and what was shared."""

    def __init__(self, store: UsageStore) -> None:
        self.now_s = 100.0
        self.shared: list[dict[str, Used]] = []
        ledger = Ledger(UNIX_S, self.now_s)
        super().__init__(
            ledger, store, lambda used, now_s: self.shared.append(dict(used)), lambda: self.now_s
        )


async def test_a_redis_that_stands_still_stops_nobody(
    server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(usage_sync, "TIMEOUT_S", 0.1)
    server.client.flushall()
    sync, other = Sync(RedisUsage(server.url, "f-0.1")), Sync(RedisUsage(server.url, "f-1.1"))
    sync.ledger.meter("a").count("m", Kind.REQUESTS, 3, sync.now_s)
    await sync.exchange()
    assert sync.ledger.shared(sync.now_s) and sync.statistics()["usage_store_up"] == 1
    server.send(signal.SIGSTOP)
    try:
        sync.ledger.meter("a").count("m", Kind.REQUESTS, 4, sync.now_s)
        for _ in range(3):
            async with asyncio.timeout(2):
                await sync.exchange()
        assert sync.ledger.meter("a").month(sync.now_s).used() == Used(7, 0)
        sync.now_s += 5.0
        assert not sync.ledger.shared(sync.now_s)
        assert sync.statistics()["usage_failures_total"] == 3
    finally:
        server.send(signal.SIGCONT)
    await sync.exchange()
    await other.exchange()
    other.ledger.meter("a").month(other.now_s)
    await other.exchange()
    assert other.ledger.meter("a").month(other.now_s).used() == Used(7, 0)
    said = [record.message for record in caplog.records if "usage is counted" in record.message]
    assert len(said) == 2 and "together again" in said[1]
    await sync.close()
    await other.close()


async def test_many_clients_are_many_scripts(server: RedisServer) -> None:
    server.client.flushall()
    sync = Sync(RedisUsage(server.url, "f-0.1"))
    for number in range(3 * ACCOUNTS_PER_SCRIPT):
        sync.ledger.meter(f"k{number}").count("m", Kind.REQUESTS, 1, sync.now_s)
    await sync.exchange()
    # What was counted before the store's clock was known stands in two minutes.
    assert sync.statistics()["usage_exchanges_total"] >= 6
    assert len(server.client.keys("slu:*}:2???-??")) >= 3 * ACCOUNTS_PER_SCRIPT
    await sync.close()


async def test_the_old_is_looked_for_beside_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where the clocks of store and host are a day apart: that may be the store's fault."""
    monkeypatch.setattr(usage_sync, "EXCHANGE_S", 0.01)

    class Slow(MemoryUsage):
        async def forget(self, oldest: str) -> None:
            await super().forget(oldest)
            await asyncio.sleep(60)

    for unix_s, forgotten in ((UNIX_S, []), (time.time(), [month(time.time(), 12).name])):
        accounts = Accounts()
        accounts.unix_s = unix_s
        store = Slow(accounts, "f-0.1")
        sync = Sync(store)
        sync.ledger.meter("a")
        running = asyncio.create_task(sync.run())
        await until(lambda: sync.statistics().get("usage_exchanges_total", 0) > 5)  # noqa: B023
        assert store.forgotten == forgotten
        running.cancel()


async def test_an_exchange_that_is_broken_off_has_said_nothing() -> None:
    """By the end of who asks for usage, or of the frontend: what it was to say is said later."""

    class Hangs(MemoryUsage):
        async def exchange(self, writes: Sequence[Write]) -> Exchanged:
            await asyncio.sleep(60)
            raise AssertionError

    accounts = Accounts()
    sync = Sync(Hangs(accounts, "f-0.1"))
    sync.ledger.meter("a").count("m", Kind.REQUESTS, 1, sync.now_s)
    for chore in (sync.exchange(), sync.ask([sync.ledger.meter("a").month(sync.now_s)])):
        task = asyncio.create_task(chore)
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        assert sync.ledger.meter("a").month(sync.now_s).dirty


async def test_the_last_is_said_at_the_end() -> None:
    accounts = Accounts()
    store = MemoryUsage(accounts, "f-0.1")
    sync = Sync(store)
    await sync.exchange()
    sync.ledger.meter("a").count("m", Kind.REQUESTS, 1, sync.now_s)
    await sync.close()
    assert accounts.kept["a", month(accounts.unix_s).name]["f-0.1"] == {"m": [1, 0, 0, 0, 0]}
    for writes in ([], [Write(account(REQUESTS=1), {}, Used(0, 0))]):
        assert (await store.exchange(writes)).unix_s == accounts.unix_s
