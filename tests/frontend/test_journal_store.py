"""Journals in a real Redis do what the store in memory does."""

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from frontend.journals import MemoryStore
from kvindex.conftest import RedisServer
from slipstream.frontend.journal import (
    RETRY_S,
    Append,
    Found,
    Journal,
    Store,
    StoreError,
    Written,
)
from slipstream.frontend.journal_store import RedisJournal
from slipstream.frontend.replay import packed

HEAD, PACK = b"\x00head\xff", b"\x93\x00pack"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="slip-redis-"))
    redis = RedisServer(folder)
    yield redis
    redis.kill()
    shutil.rmtree(folder)


@pytest.fixture(params=["redis", "memory"])
async def store(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[Store]:
    if request.param == "redis":
        server.client.flushall()
    made = RedisJournal(server.url, 60.0) if request.param == "redis" else MemoryStore()
    yield made
    await made.close()


def append(entry_id: str, head: bytes = b"", key: str = "c", pack: bytes = PACK) -> Append:
    return Append(key, entry_id, head, pack)


async def test_what_was_written_is_taken_in_order(store: Store) -> None:
    assert await store.append([append("0-1", HEAD), append("0-1", HEAD, "d")]) == [Written.DONE] * 2
    assert await store.append([append("0-2", pack=b"2")]) == [Written.DONE]
    assert await store.take("c", HEAD, 1) == Found(1, [PACK, b"2"])
    assert await store.append([append("1-1", pack=b"3")]) == [Written.DONE]
    assert await store.take("c", HEAD, 9) == Found(9, [PACK, b"2", b"3"])
    assert await store.take("c", HEAD, 1) == Found(10, [PACK, b"2", b"3"])


async def test_an_owner_from_which_it_was_taken_is_fenced(store: Store) -> None:
    await store.append([append("0-1", HEAD)])
    await store.take("c", HEAD, 1)
    ends = await store.append([append("0-2"), append("0-1", HEAD, "d")])
    assert ends == [Written.FENCED, Written.DONE], "the others of the same write are written"
    await store.drop("c", 0)
    assert await store.take("c", HEAD, 1) == Found(2, [PACK])
    await store.drop("c", 2)
    assert await store.take("c", HEAD, 1) is None


async def test_it_is_nobody_elses(store: Store) -> None:
    await store.append([append("0-1", HEAD)])
    assert await store.take("c", b"other", 1) is None
    assert await store.append([append("0-2")]) == [Written.DONE], "and nobody is fenced by trying"


async def test_what_lost_its_beginning_is_not_gone_on_with(store: Store) -> None:
    assert await store.append([append("0-2")]) == [Written.GONE]
    assert await store.take("c", HEAD, 1) is None


async def test_journals_lapse(server: RedisServer) -> None:
    server.client.flushall()
    store = RedisJournal(server.url, 0.2)
    await store.append([append("0-1", HEAD)])
    assert 0 < server.client.pttl("slj:{c}") <= 200
    async with asyncio.timeout(5):
        while server.client.exists("slj:{c}"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await store.append([append("0-2")]) == [Written.GONE]
    await store.close()


async def test_other_things_under_the_name_are_an_error_or_a_loss(server: RedisServer) -> None:
    server.client.flushall()
    server.client.set("slj:{c}", "garbage")
    store = RedisJournal(server.url, 60.0)
    assert await store.append([append("0-1", HEAD)]) == [Written.GONE]
    with pytest.raises(StoreError):
        await store.take("c", HEAD, 1)
    server.client.flushall()
    server.client.xadd("slj:{c}", {"x": "y"}, id="5-5")
    assert await store.take("c", HEAD, 1) is None
    await store.close()


async def test_a_redis_that_stands_still_holds_up_a_stream_once(server: RedisServer) -> None:
    server.client.flushall()
    now_s = [100.0]
    store = RedisJournal(server.url, 60.0)
    journal = Journal(store, 60.0, clock=lambda: now_s[0])
    told: list[tuple[int, object]] = []
    log = journal.begin("c", HEAD, 0, lambda choice, item: told.append((choice, item)))
    assert log is not None
    log.append(0, 5)
    async with asyncio.timeout(5):
        while not told:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert journal.statistics()["journal_entries_total"] == 1
    server.send(signal.SIGSTOP)
    try:
        log.append(0, 6)
        assert len(told) == 1, "not before it is written, or its time is over"
        async with asyncio.timeout(5):
            while len(told) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        log.append(1, 7)
        assert told == [(0, 5), (0, 6), (1, 7)]
        assert journal.begin("d", HEAD, 0, lambda choice, item: None) is None
    finally:
        server.send(signal.SIGCONT)
    now_s[0] += RETRY_S
    for number in range(20):  # each gets its own answer, not one that comes late
        log = journal.begin(f"e{number}", HEAD, 0, lambda choice, item: told.append((9, item)))
        assert log is not None
        log.append(0, number)
    async with asyncio.timeout(5):
        while len(told) < 23:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    for number in range(20):
        assert await store.take(f"e{number}", HEAD, 1) == Found(1, [packed([(0, number)])])
    await journal.close()


async def test_what_waits_for_others_keeps_its_place() -> None:
    """A stream without its journal is not written any more; what it said before goes first."""
    store = MemoryStore()
    store.delay_s = 0.02
    journal = Journal(store, 60.0)
    told: list[object] = []
    lost = journal.begin("gone", b"", 1, lambda choice, item: told.append(item))
    other = journal.begin("other", HEAD, 0, lambda choice, item: None)
    assert lost is not None and other is not None
    lost.append(0, 1)
    await asyncio.sleep(0.01)
    lost.append(0, 2)
    other.append(0, 0)
    while not told:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    lost.append(0, 3)
    async with asyncio.timeout(5):
        while len(told) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert told == [1, 2, 3]
    await journal.close()
