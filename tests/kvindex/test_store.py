"""Redis and its twin in memory give the same answers; what Redis loses is found out."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvindex.conftest import RedisServer, StoreClient
from slipstream.core.machine import (
    Effect,
    Exit,
    StoreAlive,
    StoreApply,
    StoreDone,
    StoreFind,
    StoreForget,
    StoreReplace,
)
from slipstream.kvindex.memory import MemoryStore

LAYOUT = "f00d/float32/l1"
HASHES = [bytes([number]) * 16 for number in range(6)]
A, B, C, D, E, F = HASHES

Ask = Callable[[Effect], Awaitable[StoreDone | None]]


@pytest.fixture(params=["memory", "redis"])
def ask(request: pytest.FixtureRequest) -> Ask:
    if request.param == "redis":
        client: StoreClient = request.getfixturevalue("store")
        return client.apply
    twin = MemoryStore()

    async def apply(effect: Effect) -> StoreDone | None:
        return twin.apply(effect)

    return apply


def replace(seq: int, *stored: bytes, worker: str = "w", epoch: int = 5) -> StoreReplace:
    return StoreReplace(f"{worker}{epoch}/{seq}", worker, epoch, LAYOUT, seq, stored)


def batch(
    seq: int,
    stored: tuple[bytes, ...] = (),
    removed: tuple[bytes, ...] = (),
    worker: str = "w",
    epoch: int = 5,
) -> StoreApply:
    return StoreApply("op", worker, epoch, LAYOUT, seq, stored, removed)


def find(*hashes: bytes, layout: str = LAYOUT) -> StoreFind:
    return StoreFind("find", layout, hashes or tuple(HASHES))


async def holders(ask: Ask, *hashes: bytes) -> tuple[dict[str, int], ...]:
    done = await ask(find(*hashes))
    assert done is not None and done.ok
    return done.holders


GOOD, GAP = StoreDone("op", ok=True), StoreDone("op", ok=True, gap=True)


async def test_events_in_order_are_applied(ask: Ask) -> None:
    assert await ask(replace(7, A, B)) == StoreDone("w5/7", ok=True)
    assert await ask(batch(8, (C, D), (B,))) == GOOD
    assert await ask(batch(9, (B,))) == GOOD
    assert await holders(ask) == ({"w": 5},) * 4
    assert await ask(batch(10, (), (A,))) == GOOD
    assert await holders(ask) == ()
    assert await holders(ask, B, C, D) == ({"w": 5},) * 3


@pytest.mark.parametrize("seq", [6, 7, 9, 100])
async def test_a_gap_or_a_repeat_changes_nothing(ask: Ask, seq: int) -> None:
    await ask(replace(7, A, B))
    assert await ask(batch(seq, (C,), (A,))) == GAP
    assert await holders(ask) == ({"w": 5},) * 2
    assert await ask(batch(8, (C,))) == GOOD


@pytest.mark.parametrize("epoch", [4, 6])
async def test_another_epoch_is_a_gap(ask: Ask, epoch: int) -> None:
    await ask(replace(7, A))
    assert await ask(batch(8, (B,), epoch=epoch)) == GAP


async def test_without_a_beginning_everything_is_a_gap(ask: Ask) -> None:
    assert await ask(batch(1, (A,))) == GAP
    assert await ask(batch(0, (A,))) == GAP
    assert await holders(ask) == ()


async def test_a_snapshot_replaces_all(ask: Ask) -> None:
    await ask(replace(7, A, B, C))
    await ask(replace(3, B, D))
    assert await holders(ask, B, D) == ({"w": 5},) * 2
    assert await holders(ask, A) == await holders(ask, C) == ()
    assert await ask(batch(4, (E,))) == GOOD
    await ask(replace(9))
    for block_hash in HASHES:
        assert await holders(ask, block_hash) == ()
    assert await ask(batch(10, (E,))) == GOOD


async def test_workers_do_not_touch_each_other(ask: Ask) -> None:
    await ask(replace(1, A, B, worker="v", epoch=9))
    await ask(replace(1, A, B, C))
    await ask(batch(2, (), (A,)))
    await ask(replace(3))
    assert await holders(ask) == ({"v": 9},) * 2
    await ask(StoreForget("w", 5))
    assert await holders(ask) == ({"v": 9},) * 2


async def test_layouts_do_not_meet(ask: Ask) -> None:
    await ask(replace(1, A))
    assert await ask(find(A, layout="other")) == StoreDone("find", ok=True)


async def test_a_new_epoch_takes_the_place_of_the_old_one(ask: Ask) -> None:
    await ask(replace(50, A, B, C))
    await ask(replace(1, B, D, epoch=6))
    assert await holders(ask, B, D) == ({"w": 6},) * 2
    assert await holders(ask, A) == await holders(ask, C) == ()
    assert await ask(batch(51, (E,))) == GAP
    assert await ask(replace(52, E)) == StoreDone("w5/52", ok=True, gap=True)
    assert await ask(batch(2, (E,), epoch=6)) == GOOD
    assert await holders(ask, E) == ({"w": 6},)


async def test_epochs_are_compared_to_the_last_nanosecond(ask: Ask) -> None:
    early = 1_763_708_000_123_456_789
    await ask(replace(1, A, epoch=early + 1))
    done = await ask(replace(1, B, epoch=early))
    assert done is not None and done.gap
    assert await ask(batch(2, (C,), epoch=early)) == GAP
    assert await ask(batch(2, (C,), epoch=early + 1)) == GOOD
    assert await holders(ask, C) == ({"w": early + 1},)


async def test_a_forgotten_worker_begins_with_a_snapshot(ask: Ask) -> None:
    await ask(replace(1, A, B))
    assert await ask(StoreForget("w", 5)) is None
    assert await holders(ask) == ()
    assert await ask(batch(2, (C,))) == GAP
    await ask(replace(2, A))
    assert await holders(ask) == ({"w": 5},)


async def test_forgetting_an_old_epoch_leaves_the_living_one(ask: Ask) -> None:
    await ask(replace(1, A, B, epoch=6))
    await ask(StoreForget("w", 5))
    assert await holders(ask) == ({"w": 6},) * 2
    assert await ask(batch(2, (C,), epoch=6)) == GOOD


async def test_each_block_has_its_own_holders(ask: Ask) -> None:
    await ask(replace(1, A, B, C, F, worker="v", epoch=9))
    await ask(replace(1, A, B, D, E, F))
    both, v, w = {"v": 9, "w": 5}, {"v": 9}, {"w": 5}
    assert await holders(ask) == (both, both, v, w, w, both)


async def test_a_question_without_content_is_a_probe(ask: Ask) -> None:
    assert await ask(StoreFind("p", "", ())) == StoreDone("p", ok=True)
    assert await ask(StoreAlive("w", 5)) is None


hashes = st.lists(st.sampled_from(HASHES), max_size=6, unique=True).map(tuple)
workers, epochs, numbers = st.sampled_from("vw"), st.integers(4, 6), st.integers(1, 9)
effects = st.one_of(
    st.builds(
        lambda s, h, w, e: replace(s, *h, worker=w, epoch=e), numbers, hashes, workers, epochs
    ),
    st.builds(batch, numbers, hashes, hashes, workers, epochs),
    st.builds(StoreForget, workers, epochs),
    st.builds(StoreAlive, workers, epochs),
)
Follow = Callable[[int], Effect]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=st.lists(st.tuples(effects, st.booleans()), max_size=25))
async def test_redis_and_its_twin_agree(
    redis: RedisServer, store: StoreClient, drawn: list[tuple[Effect, bool]]
) -> None:
    redis.client.flushall()
    twin = MemoryStore()
    for effect, follow in drawn:
        if isinstance(effect, StoreApply):
            known = twin.workers.get(effect.worker)
            if follow and known is not None:  # else almost every batch would be a gap
                effect = batch(
                    *(known.last_seq + 1, effect.stored),
                    *(tuple(h for h in effect.removed if h not in effect.stored), effect.worker),
                    known.epoch,
                )
        assert await store.apply(effect) == twin.apply(effect)
        for block_hash in HASHES:
            question = find(block_hash)
            assert await store.apply(question) == twin.apply(question)
    _audit(redis, twin)


def _audit(redis: RedisServer, twin: MemoryStore) -> None:
    """The reverse index names every entry, and nothing is left over."""
    client: Any = redis.client
    named = {
        (name.split(b":")[1], int(name.split(b":")[2]), key)
        for name in client.scan_iter("kvw:*")
        for key in client.smembers(name)
    }
    entries = {
        (worker, int(value.split(b":")[0]), key)
        for key in client.scan_iter("kvb:*")
        for worker, value in client.hgetall(key).items()
    }
    assert entries <= named
    expected = {
        (worker.encode(), epoch, b"kvb:" + layout.encode() + b":" + block_hash)
        for (layout, block_hash), found in twin.entries.items()
        for worker, epoch in found.items()
    }
    assert entries == expected
    assert {name for name in client.scan_iter("kvw:*")} <= {
        b"kvw:%s:%s" % (name[4:], epoch)
        for name in client.scan_iter("kve:*")
        for epoch in client.smembers(name)
    }


async def test_many_blocks_in_small_bites(redis: RedisServer, store: StoreClient) -> None:
    many = [number.to_bytes(16, "big") for number in range(5000)]
    await store.apply(replace(1, *many[:4000]))
    await store.apply(replace(2, *many[1000:]))
    await store.apply(batch(3, (), tuple(many[1000:3000])))
    assert sum(1 for _ in redis.client.scan_iter("kvb:*", count=1000)) == 2000
    assert len(await holders(store.apply, *many[3000:])) == 2000
    await store.apply(StoreForget("w", 5))
    assert not list(redis.client.scan_iter("*"))


async def test_a_lapsed_worker_begins_anew_and_a_renewed_one_goes_on(redis: RedisServer) -> None:
    client = StoreClient(redis.url, worker_ttl_s=60.0)
    await client.store.start(client.events.put_nowait)
    await client.apply(replace(1, A))
    remaining_ms = redis.client.pttl("w:w")
    assert 0 < remaining_ms <= 60_000
    redis.client.pexpire("w:w", 1_000)
    await client.apply(StoreAlive("w", 4))
    assert redis.client.pttl("w:w") <= 1_000  # an epoch that is over renews nothing
    await client.apply(StoreAlive("w", 5))
    assert redis.client.pttl("w:w") > 1_000
    redis.client.delete("w:w")
    assert await client.apply(batch(2, (B,))) == GAP
    await client.apply(StoreAlive("w", 5))
    assert not redis.client.exists("w:w")
    await client.store.close()


async def test_flushall_shows_as_a_gap(redis: RedisServer, store: StoreClient) -> None:
    await store.apply(replace(1, A, B))
    redis.client.flushall()
    assert await store.apply(batch(2, (C,))) == GAP
    assert await holders(store.apply) == ()
    await store.apply(replace(2, A, B, C))
    assert await holders(store.apply) == ({"w": 5},) * 3


async def test_whoever_replaces_later_takes_over(redis: RedisServer, store: StoreClient) -> None:
    """Two replicas of kvindex at once, or an operation that was given up and still runs."""
    many = tuple(number.to_bytes(16, "big") for number in range(3000))
    for number in range(40):
        store.store.execute(replace(1, *many))
        for _ in range(number):
            await asyncio.sleep(0)
        store.store.execute(StoreReplace("later", "w", 5, LAYOUT, 2, many[::2]))
        await store.store.idle()
        ended = [store.events.get_nowait() for _ in range(2)]
        later = next(e for e in ended if isinstance(e, StoreDone) and e.op_id == "later")
        if not later.gap:
            held = {key[-16:] for key in redis.client.sscan_iter("kvw:w:5", count=5000)}
            assert held == set(many[::2])
            assert await store.apply(batch(3)) == GOOD
        redis.client.flushall()


async def test_a_worker_that_comes_back_is_not_swept(
    redis: RedisServer, store: StoreClient
) -> None:
    """Told that it is gone and, in the same epoch, that it is there."""
    many = tuple(number.to_bytes(16, "big") for number in range(3000))
    for number in range(30):
        await store.apply(replace(1, *many))
        store.store.execute(StoreForget("w", 5))
        for _ in range(number * 3):
            await asyncio.sleep(0)
        store.store.execute(replace(2, *many))
        await store.store.idle()
        done = store.events.get_nowait()
        assert isinstance(done, StoreDone) and done.ok
        if not done.gap:
            assert len(await holders(store.apply, *many)) == len(many)


async def test_a_dead_redis_is_an_answer(redis: RedisServer, store: StoreClient) -> None:
    await store.apply(replace(1, A))
    redis.kill()
    failed = [
        await store.apply(effect)
        for effect in (batch(2, (B,)), replace(3, A), find(), StoreFind("p", "", ()))
    ]
    assert [done.ok for done in failed if done] == [False] * 4
    assert await store.apply(StoreAlive("w", 5)) is None
    assert await store.apply(StoreForget("w", 5)) is None
    redis.start()
    assert await store.apply(batch(2, (B,))) == GAP
    assert await store.apply(replace(3, A, B)) == StoreDone("w5/3", ok=True)
    assert await holders(store.apply) == ({"w": 5},) * 2


async def test_a_hanging_redis_is_given_up_in_time(redis: RedisServer) -> None:
    client = StoreClient(redis.url, timeout_s=0.2)
    await client.store.start(client.events.put_nowait)
    await client.apply(replace(1, A))
    redis.send(signal.SIGSTOP)
    try:
        for effect in (batch(2, (B,)), replace(3, A), find(), StoreFind("p", "", ())):
            done = await client.apply(effect)
            assert done is not None and not done.ok
    finally:
        redis.send(signal.SIGCONT)
    # What it was told while it slept, it may still have done: a snapshot puts it right.
    assert await client.apply(replace(4, A, B)) == StoreDone("w5/4", ok=True)
    assert await holders(client.apply) == ({"w": 5},) * 2
    assert await client.apply(batch(5, (C,))) == GOOD
    await client.store.close()


async def test_a_lying_redis_costs_hits_only(redis: RedisServer, store: StoreClient) -> None:
    key = f"kvb:{LAYOUT}:".encode() + A
    redis.client.hset(
        key, mapping={"w": "nonsense", b"\xff": "5:0", "v": "7:1", "u": "", "t": "-5:0"}
    )
    assert await holders(store.apply, A) == ({"�": 5, "v": 7},)
    redis.client.set(f"kvb:{LAYOUT}:".encode() + B, "a string")
    done = await store.apply(find(B))
    assert done is not None and not done.ok
    redis.client.set("w:w", "a string")
    done = await store.apply(batch(1, (C,)))
    assert done is not None and not done.ok
    done = await store.apply(replace(1, C))
    assert done is not None and not done.ok


async def test_closing_answers_what_is_under_way(redis: RedisServer) -> None:
    client = StoreClient(redis.url)
    await client.store.start(client.events.put_nowait)
    redis.send(signal.SIGSTOP)
    try:
        for number in range(40):
            client.store.execute(StoreFind(str(number), LAYOUT, (A,)))
        await asyncio.sleep(0)
        await asyncio.wait_for(client.store.close(), 10)
    finally:
        redis.send(signal.SIGCONT)


async def test_an_effect_of_another_service_is_a_bug(ask: Ask) -> None:
    with pytest.raises(TypeError, match="Exit"):
        await ask(Exit())
