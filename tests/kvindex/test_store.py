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


Lower = dict[int, tuple[bytes, ...]]


def replace(
    seq: int, *stored: bytes, worker: str = "w", epoch: int = 5, lower: Lower | None = None
) -> StoreReplace:
    return StoreReplace(f"{worker}{epoch}/{seq}", worker, epoch, seq, stored, lower or {})


def batch(
    seq: int,
    stored: tuple[bytes, ...] = (),
    removed: tuple[bytes, ...] = (),
    worker: str = "w",
    epoch: int = 5,
    lower: Lower | None = None,
) -> StoreApply:
    return StoreApply("op", worker, epoch, seq, stored, removed, lower or {})


def alive(seq: int, epoch: int = 5) -> StoreAlive:
    return StoreAlive("op", "w", epoch, seq)


async def held(
    ask: Ask, *hashes: bytes, workers: dict[str, int] | None = None
) -> dict[str, tuple[int, int]]:
    """Worker -> leading blocks, and how many of them are in a lower tier."""
    done = await ask(StoreFind("find", hashes or tuple(HASHES), workers or {"w": 5}))
    assert done is not None and done.ok
    return {worker: (held.blocks, held.lower) for worker, held in done.holders.items()}


FIND = StoreFind("find", tuple(HASHES), {"w": 5})
GOOD, GAP = StoreDone("op", ok=True), StoreDone("op", ok=True, gap=True)


async def test_events_in_order_are_applied(ask: Ask) -> None:
    assert await ask(replace(7, A, B)) == StoreDone("w5/7", ok=True)
    assert await ask(batch(8, (C, D))) == GOOD
    assert await held(ask) == {"w": (4, 0)}
    assert await ask(batch(9, (B,), (C, D))) == GOOD
    assert await held(ask) == {"w": (2, 0)}
    assert await ask(batch(9, (C,))) == GAP
    assert await ask(batch(10, (), (A,))) == GOOD
    assert await held(ask) == {}
    assert await held(ask, B) == {"w": (1, 0)}


@pytest.mark.parametrize("seq", [6, 7, 9, 100])
async def test_a_gap_or_a_repeat_changes_nothing(ask: Ask, seq: int) -> None:
    await ask(replace(7, A, B))
    assert await ask(batch(seq, (C,), (A,))) == GAP
    assert await held(ask) == {"w": (2, 0)}
    assert await ask(batch(8, (C,))) == GOOD


@pytest.mark.parametrize("epoch", [4, 6])
async def test_another_epoch_is_a_gap_and_holds_nothing(ask: Ask, epoch: int) -> None:
    await ask(replace(7, A))
    assert await ask(batch(8, (B,), epoch=epoch)) == GAP
    assert await held(ask, workers={"w": epoch}) == {}


async def test_without_a_beginning_everything_is_a_gap(ask: Ask) -> None:
    assert await ask(batch(1, (A,))) == GAP
    assert await ask(batch(0, (A,))) == GAP
    assert await ask(alive(0)) == GAP
    assert await held(ask) == {}


async def test_a_snapshot_replaces_all(ask: Ask) -> None:
    await ask(replace(7, A, B, C))
    await ask(replace(3, B, D))
    assert await held(ask, B, D) == {"w": (2, 0)}
    assert await held(ask, A) == await held(ask, C) == {}
    assert await ask(batch(4, (E,))) == GOOD
    await ask(replace(9))
    for block_hash in HASHES:
        assert await held(ask, block_hash) == {}
    assert await ask(batch(10, (E,))) == GOOD


async def test_a_block_is_in_its_best_tier_alone(ask: Ask) -> None:
    await ask(replace(1, A, B, lower={1: (C,), 2: (D, B)}))
    assert await held(ask) == {"w": (4, 2)}
    await ask(batch(2, (D,), lower={1: (A,)}))
    assert await held(ask, A) == {"w": (1, 1)}
    assert await held(ask, D) == await held(ask, B) == {"w": (1, 0)}
    await ask(batch(3, (A, C)))
    assert await held(ask) == {"w": (4, 0)}
    await ask(batch(4, (), (D,), lower={2: (C, B, A), 1: (C,)}))
    assert await held(ask) == {"w": (3, 3)}


async def test_workers_do_not_touch_each_other(ask: Ask) -> None:
    both = {"v": 9, "w": 5}
    await ask(replace(1, A, B, worker="v", epoch=9))
    await ask(replace(1, A, B, C))
    await ask(batch(2, (), (A,)))
    assert await held(ask, workers=both) == {"v": (2, 0)}
    await ask(StoreForget("w", 5))
    assert await held(ask, B, C, workers=both) == {"v": (1, 0)}


async def test_a_new_epoch_takes_the_place_of_the_old_one(ask: Ask) -> None:
    await ask(replace(50, A, B, C))
    await ask(replace(1, B, D, epoch=6))
    assert await held(ask, B, D, workers={"w": 6}) == {"w": (2, 0)}
    assert await held(ask, B, D) == {}
    assert await ask(batch(51, (E,))) == GAP
    assert await ask(batch(2, (E,), epoch=6)) == GOOD


async def test_epochs_are_compared_to_the_last_nanosecond(ask: Ask) -> None:
    early = 1_763_708_000_123_456_789
    await ask(replace(1, A, epoch=early + 1))
    assert await ask(batch(2, (C,), epoch=early)) == GAP
    assert await held(ask, workers={"w": early}) == {}
    await ask(StoreForget("w", early))
    assert await ask(batch(2, (C,), epoch=early + 1)) == GOOD
    assert await held(ask, A, workers={"w": early + 1}) == {"w": (1, 0)}


async def test_a_forgotten_worker_begins_with_a_snapshot(ask: Ask) -> None:
    await ask(replace(1, A, B))
    assert await ask(StoreForget("w", 5)) is None
    assert await held(ask) == {}
    assert await ask(batch(2, (C,))) == GAP
    await ask(replace(2, A))
    assert await held(ask) == {"w": (1, 0)}


async def test_who_lives_on_is_what_was_applied_last(ask: Ask) -> None:
    await ask(replace(1, A))
    assert await ask(alive(1)) == GOOD
    assert await ask(alive(2)) == GAP
    assert await ask(alive(1, epoch=6)) == GAP
    await ask(batch(2))
    assert await ask(alive(2)) == GOOD


async def test_a_question_without_workers_is_a_probe(ask: Ask) -> None:
    assert await ask(StoreFind("p")) == StoreDone("p", ok=True)


hashes = st.lists(st.sampled_from(HASHES), max_size=6, unique=True).map(tuple)
tiers = st.dictionaries(st.sampled_from([1, 2]), hashes, max_size=2)
workers, epochs, numbers = st.sampled_from("vw"), st.integers(4, 6), st.integers(1, 9)
effects = st.one_of(
    st.builds(
        lambda s, h, w, e, lo: replace(s, *h, worker=w, epoch=e, lower=lo),
        *(numbers, hashes, workers, epochs, tiers),
    ),
    st.builds(batch, numbers, hashes, hashes, workers, epochs, tiers),
    st.builds(StoreForget, workers, epochs),
    st.builds(StoreAlive, st.just("op"), workers, epochs, numbers),
)


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
                seq, epoch = known.seq + 1, known.epoch
                effect = batch(
                    *(seq, effect.stored, effect.removed, effect.worker, epoch), effect.lower
                )
        assert await store.apply(effect) == twin.apply(effect)
        for epoch in (4, 5, 6):
            for first in range(len(HASHES)):
                question = StoreFind("f", tuple(HASHES[first:]), {"v": epoch, "w": epoch})
                assert await store.apply(question) == twin.apply(question)
    stored: Any = redis.client
    there = {
        name.rpartition(b":")[2].decode(): {
            field: int(value) for field, value in stored.hgetall(name).items() if len(field) == 16
        }
        for name in stored.keys("*")
    }
    assert there == {name: worker.tiers for name, worker in twin.workers.items()}


async def test_many_blocks_in_small_bites(redis: RedisServer, store: StoreClient) -> None:
    many = [number.to_bytes(16, "big") for number in range(9000)]
    await store.apply(replace(1, *many[:4000], lower={1: tuple(many[4000:9000])}))
    assert await held(store.apply, *many) == {"w": (9000, 5000)}
    await store.apply(replace(2, *many[1000:]))
    await store.apply(batch(3, (), tuple(many[1000:3000])))
    assert await held(store.apply, *many[3000:]) == {"w": (6000, 0)}
    assert await held(store.apply, *many[2999:]) == {}
    assert len(redis.client.keys("*")) == 1
    await store.apply(StoreForget("w", 5))
    assert not redis.client.keys("*")


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 511, 512, 513, 4096])
async def test_a_run_ends_where_the_first_block_is_missing(store: StoreClient, count: int) -> None:
    many = [number.to_bytes(16, "big") for number in range(5000)]
    await store.apply(replace(1, *many[: count // 2], lower={1: tuple(many[count // 2 : count])}))
    lower = count - count // 2
    assert await held(store.apply, *many) == {"w": (count, lower)}
    assert await held(store.apply, *many[:count]) == {"w": (count, lower)}
    assert await held(store.apply, *many[count - 1 :]) == {"w": (1, 1)}


async def test_a_lapsed_worker_begins_anew_and_a_renewed_one_goes_on(redis: RedisServer) -> None:
    client = StoreClient(redis.url, worker_ttl_s=60.0)
    await client.store.start(client.events.put_nowait)
    await client.apply(replace(1, A))
    (key,) = redis.client.keys("*")
    assert 0 < redis.client.pttl(key) <= 60_000
    redis.client.pexpire(key, 1_000)
    assert await client.apply(alive(1, epoch=4)) == GAP
    assert redis.client.pttl(key) <= 1_000, "an epoch that is over renews nothing"
    assert await client.apply(alive(1)) == GOOD
    assert redis.client.pttl(key) > 1_000
    redis.client.delete(key)
    assert await client.apply(batch(2, (B,))) == GAP
    assert await client.apply(alive(1)) == GAP
    assert not redis.client.exists(key)
    await client.store.close()


async def test_flushall_shows_as_a_gap(redis: RedisServer, store: StoreClient) -> None:
    await store.apply(replace(1, A, B))
    redis.client.flushall()
    assert await store.apply(alive(1)) == GAP
    assert await store.apply(batch(2, (C,))) == GAP
    assert await held(store.apply) == {}
    await store.apply(replace(2, A, B, C))
    assert await held(store.apply) == {"w": (3, 0)}


async def test_what_is_flushed_in_the_middle_of_a_snapshot_is_a_gap(
    redis: RedisServer, store: StoreClient
) -> None:
    many = tuple(number.to_bytes(16, "big") for number in range(20_000))
    gaps = 0
    for number in range(60):
        store.store.execute(replace(1, *many))
        for _ in range(number):
            await asyncio.sleep(0)
        redis.client.flushall()
        await store.store.idle()
        done = store.events.get_nowait()
        assert isinstance(done, StoreDone) and done.ok
        gaps += done.gap
        found = await held(store.apply, *many[:4096])
        # Flushed before the first bite or after the last: all of it, or nothing at all.
        assert found in ({}, {"w": (4096, 0)})
        assert await store.apply(alive(1)) in (GOOD, GAP)
        assert (await store.apply(alive(1)) == GOOD) == bool(found)
    assert gaps


async def test_of_two_who_replace_at_once_one_wins_wholly(
    redis: RedisServer, store: StoreClient
) -> None:
    """Two replicas of kvindex, or an operation that was given up and still runs."""
    many = tuple(number.to_bytes(16, "big") for number in range(6000))
    for number in range(40):
        store.store.execute(replace(1, *many))
        for _ in range(number):
            await asyncio.sleep(0)
        store.store.execute(StoreReplace("later", "w", 5, 2, many[::2]))
        await store.store.idle()
        assert [store.events.get_nowait() for _ in range(2)]
        (key,) = redis.client.keys("*")
        there = {field for field in redis.client.hkeys(key) if len(field) == 16}
        seq = 1 if await store.apply(alive(1)) == GOOD else 2
        assert there == set(many if seq == 1 else many[::2])
        assert await store.apply(batch(seq + 1)) == GOOD
        redis.client.flushall()


async def test_a_dead_redis_is_an_answer(redis: RedisServer, store: StoreClient) -> None:
    await store.apply(replace(1, A))
    redis.kill()
    failed = [
        await store.apply(effect)
        for effect in (batch(2, (B,)), replace(3, A), FIND, alive(3), StoreFind("p"))
    ]
    assert [done.ok for done in failed if done] == [False] * 5
    assert await store.apply(StoreForget("w", 5)) is None
    redis.start()
    assert await store.apply(batch(2, (B,))) == GAP
    assert await store.apply(replace(3, A, B)) == StoreDone("w5/3", ok=True)
    assert await held(store.apply) == {"w": (2, 0)}
    counted = store.store.statistics()
    assert counted["store_operations_total"] == 10
    assert counted["store_operation_seconds_total"] > 0


async def test_a_hanging_redis_is_given_up_in_time(redis: RedisServer) -> None:
    client = StoreClient(redis.url, timeout_s=0.2)
    await client.store.start(client.events.put_nowait)
    await client.apply(replace(1, A))
    redis.send(signal.SIGSTOP)
    try:
        for effect in (batch(2, (B,)), replace(3, A), FIND, alive(3), StoreFind("p")):
            done = await client.apply(effect)
            assert done is not None and not done.ok
    finally:
        redis.send(signal.SIGCONT)
    # What it was told while it slept, it may still have done: a snapshot puts it right.
    assert await client.apply(replace(4, A, B)) == StoreDone("w5/4", ok=True)
    assert await held(client.apply) == {"w": (2, 0)}
    assert await client.apply(batch(5, (C,))) == GOOD
    await client.store.close()


async def test_garbage_in_redis_is_found_out_and_replaced(
    redis: RedisServer, store: StoreClient
) -> None:
    await store.apply(replace(1, A, B, worker="v"))
    await store.apply(replace(1, A, B))
    both = {"v": 5, "w": 5}
    key = next(key for key in redis.client.keys("*") if key.endswith(b":w"))
    redis.client.hset(key, mapping={B: "nonsense", C: b"\xff\x00", b"odd": "1", b"": ""})
    assert await held(store.apply, workers=both) == {"v": (2, 0), "w": (3, 2)}
    redis.client.hset(key, "seq", "-1e9")
    assert await store.apply(alive(1)) == GAP
    redis.client.hset(key, "epoch", "9" * 40)
    assert await store.apply(batch(2)) == GAP
    assert await held(store.apply, workers=both) == {"v": (2, 0)}
    redis.client.delete(key)
    for spoil in (lambda: redis.client.set(key, "text"), lambda: redis.client.rpush(key, "a", "b")):
        spoil()
        assert await held(store.apply, workers=both) == {"v": (2, 0)}, "the others count"
        for effect in (alive(1), batch(2)):
            done = await store.apply(effect)
            assert done is not None and not done.ok
        assert await store.apply(StoreForget("w", 5)) is None
        assert await store.apply(replace(3, A, C)) == StoreDone("w5/3", ok=True)
        assert await held(store.apply, A, C) == {"w": (2, 0)}
        assert await store.apply(alive(3)) == GOOD
        redis.client.delete(key)


async def test_closing_answers_what_is_under_way(redis: RedisServer) -> None:
    client = StoreClient(redis.url)
    await client.store.start(client.events.put_nowait)
    redis.send(signal.SIGSTOP)
    try:
        for number in range(40):
            client.store.execute(StoreFind(str(number), (A,), {"w": 5}))
        await asyncio.sleep(0)
        await asyncio.wait_for(client.store.close(), 10)
    finally:
        redis.send(signal.SIGCONT)


async def test_an_effect_of_another_service_is_a_bug(ask: Ask) -> None:
    with pytest.raises(TypeError, match="Exit"):
        await ask(Exit())
