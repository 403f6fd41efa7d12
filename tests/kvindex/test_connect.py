"""One index, wherever Redis runs: over TLS, behind Sentinels, on a Cluster."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex import servers
from kvindex.conftest import RedisServer, StoreClient
from slipstream.core.machine import (
    Held,
    StoreAlive,
    StoreApply,
    StoreDone,
    StoreFind,
    StoreForget,
    StoreReplace,
)
from slipstream.kvindex.store import SHARDS, _shard
from slipstream.runtime.redis_url import connect

MANY = tuple(number.to_bytes(16, "big") for number in range(3000))
WORKERS = {f"worker-{number}": 5 for number in range(40)}
PASSWORD = "s3cret:/@%"
QUOTED = "s3cret%3A%2F%40%25"


@asynccontextmanager
async def store_at(url: str, timeout_s: float = 10.0) -> AsyncIterator[StoreClient]:
    client = StoreClient(url, timeout_s)
    await client.store.start(client.events.put_nowait)
    try:
        yield client
    finally:
        await client.store.close()


async def fill(client: StoreClient) -> None:
    for count, worker in enumerate(WORKERS, 1):
        snapshot = StoreReplace(f"op{count}", worker, 5, 1, MANY[:count])
        assert await client.apply(snapshot) == StoreDone(f"op{count}", ok=True)


async def tour(client: StoreClient) -> None:
    """Every operation, on workers of every shard."""
    assert {_shard(worker) for worker in WORKERS} == set(range(SHARDS))
    assert await client.apply(StoreFind("probe")) == StoreDone("probe", ok=True)
    await fill(client)
    found = await client.apply(StoreFind("find", MANY[:30], WORKERS))
    assert found is not None and found.ok
    assert found.holders == {w: Held(min(n, 30)) for n, w in enumerate(WORKERS, 1)}
    whole = StoreReplace("whole", "worker-0", 5, 2, MANY[:2500], {1: MANY[2500:]})
    assert await client.apply(whole) == StoreDone("whole", ok=True)
    for worker in WORKERS:
        seq = 3 if worker == "worker-0" else 2
        batch = StoreApply("op", worker, 5, seq, MANY[:1], MANY[1:])
        assert await client.apply(batch) == StoreDone("op", ok=True)
        assert await client.apply(batch) == StoreDone("op", ok=True, gap=True)
        assert await client.apply(StoreAlive("op", worker, 5, seq)) == StoreDone("op", ok=True)
    found = await client.apply(StoreFind("find", MANY, WORKERS))
    assert found is not None and found.holders == dict.fromkeys(WORKERS, Held(1))
    for worker in WORKERS:
        await client.apply(StoreForget(worker, 5))
    assert await client.apply(StoreFind("find", MANY, WORKERS)) == StoreDone("find", ok=True)


async def test_over_tls(redis: RedisServer) -> None:
    with servers.tls(redis.socket) as (port, certificate):
        async with store_at(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}") as client:
            await tour(client)
        async with store_at(f"rediss://127.0.0.1:{port}/0") as client:
            failed = await client.apply(StoreFind("probe"))
            assert failed == StoreDone("probe", ok=False), "nobody vouches for it"
        async with store_at(f"redis://127.0.0.1:{port}/0", timeout_s=2.0) as client:
            assert await client.apply(StoreFind("probe")) == StoreDone("probe", ok=False)


async def test_on_a_cluster_and_with_a_part_of_it() -> None:
    with servers.cluster() as nodes:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        async with store_at(f"redis+cluster://{hosts}", timeout_s=5.0) as client:
            await tour(client)
            await fill(client)
            held = [len(node.client.keys("*")) for node in nodes]
            assert sum(held) == len(WORKERS) and min(held) > 0, "each has its share"
            lost = nodes[1].client.keys("*")
            nodes[1].kill()
            gone = {key.decode().rpartition(":")[2] for key in lost}
            found = await client.apply(StoreFind("find", MANY[:1], WORKERS))
            assert found is not None and found.ok
            assert found.holders.keys() == WORKERS.keys() - gone
            for worker in WORKERS:
                done = await client.apply(StoreAlive("op", worker, 5, 1))
                assert done is not None and done.ok == (worker not in gone)
        async with store_at(f"redis+cluster://127.0.0.1:1,{hosts}", timeout_s=5.0) as client:
            found = await client.apply(StoreFind("find", MANY[:1], WORKERS))
            assert found is not None and found.ok, "any node that lives leads to the others"


async def test_behind_a_sentinel_and_through_a_failover(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with servers.sentinel(PASSWORD) as (master, replica, voter):
        places = f"127.0.0.1:1,127.0.0.1:{voter.port}/mymaster/1"
        url = f"redis+sentinel://:{QUOTED}@{places}?sentinel_password={QUOTED}"
        async with store_at(url, timeout_s=5.0) as client:
            await tour(client)
            await fill(client)
            assert master.client.info("keyspace").keys() == {"db1"}
            master.kill()
            failed = await client.apply(StoreFind("probe"))
            assert failed == StoreDone("probe", ok=False)
            async with asyncio.timeout(servers.WAIT_S):
                while (await client.apply(StoreFind("probe"))) != StoreDone("probe", ok=True):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert replica.client.info("replication")["role"] == "master"
            await tour(client)
        async with store_at(url.replace(QUOTED, "wrong")) as client:
            assert await client.apply(StoreFind("probe")) == StoreDone("probe", ok=False)
    assert PASSWORD not in caplog.text and QUOTED not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "http://host:1",
        "redis+other://host:1",
        "unix+cluster:///socket",
        "redis+cluster://",
        "redis+cluster://,",
        "redis+cluster://host:1/0",
        "redis+cluster://host:not-a-port",
        "redis+sentinel://host:1",
        "redis+sentinel://host:1/",
        "redis+sentinel://host:1/name/first",
        "redis://:hunter2@host:not-a-port",
        "redis://:hunt/er2@host:1",
        "redis://host:99999999",
        "redis://host:1?socket_timeout=long",
        "redis://host:1?hunter2=1",
        "redis+cluster://host:1?hunter2=1",
        "redis+sentinel://host:1/name?hunter2=1",
        "redis://host:1/hunter2",
        "redis://:hunter2@:6379",
        "unix://",
    ],
)
def test_a_malformed_url_says_what_is_expected_and_quotes_nothing(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        connect(url, 1.0)
    assert "redis" in str(caught.value).lower()
    assert "hunt" not in str(caught.value) and "not-a-port" not in str(caught.value)
    assert "\n" not in str(caught.value)


@given(url=st.text(max_size=40), scheme=st.sampled_from(["redis", "redis+cluster", "unix"]))
def test_any_text_is_a_client_or_one_line(url: str, scheme: str) -> None:
    for text in (url, f"{scheme}://{url}", f"redis+sentinel://{url}"):
        try:
            connect(text, 1.0)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
