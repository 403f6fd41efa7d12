"""Whatever becomes of Redis costs hits for a while: no request fails, and hits come back."""

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from e2e.client import Answer, Client
from e2e.stack import Stack, until
from kvindex.conftest import RedisServer

LENGTH = 320
BLOCKS = LENGTH // 16
FRESH = count(1)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="slip-redis-", dir="/tmp"))
    server = RedisServer(folder)
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stack(redis: RedisServer) -> Iterator[Stack]:
    """Two prefill workers, so that it matters who is said to have what, and two indexes."""
    settings = redis.socket.parent / "slipstream.toml"
    settings.write_text("[kvindex]\nresync_s = 2.0\nredis_timeout_s = 0.5\n")
    stack = Stack(
        prefill=2,
        kvindex=2,
        threads=1,
        redis_url=redis.url,
        config=settings,
        locate_timeout_s=2.0,
    )
    yield stack
    stack.close()


def prompt(number: int) -> list[int]:
    return [(number * 7919 * (index + 1)) % 40_000 + 200 for index in range(LENGTH)] + [300, 301]


@asynccontextmanager
async def load(client: Client) -> AsyncIterator[list[Answer]]:
    """Requests one after another, with prompts old and new; none may fail."""
    answers: list[Answer] = []
    stop = asyncio.Event()

    async def ask(own: int) -> None:
        while not stop.is_set():
            answers.append(await client.complete(prompt(next(FRESH)), max_tokens=2))
            answers.append(await client.complete(prompt(own), max_tokens=2))

    asking = [asyncio.create_task(ask(9000 + own)) for own in range(2)]
    try:
        yield answers
    finally:
        stop.set()
        await asyncio.gather(*asking)


def claimed(stack: Stack, tokens: list[int]) -> int:
    """Blocks that the index claimed for the last request with this prompt."""
    packed = b"".join(token.to_bytes(4, "little") for token in tokens)
    given = [
        fields["message"].get("claimed_blocks", 0)
        for _, name, fields in stack.story("scheduler")
        if name == "Send"
        and fields["message"]["type"] == "Prefill"
        and fields["message"]["prompt"] == packed
    ]
    return int(given[-1])


async def hit(stack: Stack, client: Client, tokens: list[int], expected: str) -> bool:
    """Whether the index leads this prompt to a cache; the answer is right in any case."""
    answer = await client.complete(tokens, max_tokens=8)
    assert answer.text == expected
    if answer.cached_tokens < LENGTH:
        return False
    return await asyncio.to_thread(claimed, stack, tokens) >= BLOCKS


async def until_hit(stack: Stack, client: Client, tokens: list[int], expected: str) -> None:
    async with asyncio.timeout(60):
        while not await hit(stack, client, tokens, expected):
            pass  # each try takes its time


def index_of(redis: RedisServer) -> dict[bytes, dict[bytes, bytes]]:
    store: Any = redis.client
    return {key: store.hgetall(key) for key in store.keys("kvw:*")}


def stop(redis: RedisServer) -> None:
    redis.send(signal.SIGSTOP)


def go_on(redis: RedisServer) -> None:
    redis.send(signal.SIGCONT)


def kill(redis: RedisServer) -> None:
    redis.kill()


def start_empty(redis: RedisServer) -> None:
    assert not list(redis.socket.parent.glob("*.rdb"))  # nothing to begin with
    redis.start()


def flush(redis: RedisServer) -> None:
    redis.client.flushall()


def wrong_types(redis: RedisServer) -> None:
    for number, key in enumerate(index_of(redis)):
        redis.client.delete(key)
        if number % 2:
            redis.client.set(key, "garbage")
        else:
            redis.client.rpush(key, "gar", "bage")


def wrong_values(redis: RedisServer) -> None:
    for number, (key, fields) in enumerate(index_of(redis).items()):
        nonsense = {field: b"\xff\x00nonsense" for field in fields if len(field) == 16}
        clock = {b"epoch": b"9" * 30} if number % 2 else {b"seq": b"-1"}
        redis.client.hset(key, mapping={**nonsense, **clock})


def lost_entries(redis: RedisServer) -> None:
    """Nothing shows it but the hits that are missing."""
    for key, fields in index_of(redis).items():
        redis.client.hdel(key, *(field for field in fields if len(field) == 16))


def nothing(redis: RedisServer) -> None:
    assert redis.client.ping()


@pytest.mark.parametrize(
    ("spoil", "mend"),
    [
        (stop, go_on),
        (kill, start_empty),
        (flush, nothing),
        (wrong_types, nothing),
        (wrong_values, nothing),
        (lost_entries, nothing),
    ],
    ids=lambda step: step.__name__,
)
async def test_no_request_fails_and_hits_come_back(
    stack: Stack,
    redis: RedisServer,
    spoil: Callable[[RedisServer], None],
    mend: Callable[[RedisServer], None],
) -> None:
    async with Client(stack.url) as client:
        tokens = prompt(next(FRESH) + 5000)
        expected = (await client.complete(tokens, max_tokens=8)).text
        await until_hit(stack, client, tokens, expected)
        async with load(client) as answers:
            await asyncio.to_thread(spoil, redis)
            begun = len(answers)
            async with asyncio.timeout(60):
                while len(answers) < begun + 4:
                    await hit(stack, client, tokens, expected)
            await asyncio.to_thread(mend, redis)
            await until_hit(stack, client, tokens, expected)
        assert all(answer.status == 200 for answer in answers)


async def test_lying_entries_are_counted_and_put_right(stack: Stack, redis: RedisServer) -> None:
    """Each worker is said to have what the others have."""
    async with Client(stack.url) as client:
        before = sum(stack.worker("index_claims_wrong_total").values())

        async def all_ask(prompts: list[list[int]]) -> list[str]:
            asked = [client.complete(tokens, max_tokens=4) for tokens in prompts]
            return [answer.text for answer in await asyncio.gather(*asked)]

        def lie() -> None:
            index = index_of(redis)
            entries = {h: b"0" for fields in index.values() for h in fields if len(h) == 16}
            for key in index:
                redis.client.hset(key, mapping=entries)

        async with asyncio.timeout(120):
            while sum(stack.worker("index_claims_wrong_total").values()) == before:
                prompts = [prompt(next(FRESH)) for _ in range(4)]
                expected = await all_ask(prompts)
                await asyncio.to_thread(lie)
                # In another order: the same one would send each prompt where it was before.
                assert await all_ask(prompts[::-1]) == expected[::-1]
        claims = sum(stack.worker("index_claims_total").values())
        assert claims >= sum(stack.worker("index_claims_wrong_total").values())

        def true() -> bool:
            """Every worker's blocks in the index are as many as it has in its cache."""
            cached = stack.worker("blocks_cached")
            told = {
                key.decode().rpartition(":")[2]: sum(len(field) == 16 for field in fields)
                for key, fields in index_of(redis).items()
            }
            return {node: told.get(node, 0) for node in cached} == cached

        await asyncio.to_thread(until, true, "the index is as the caches are")
