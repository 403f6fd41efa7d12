"""A long prefix is prefilled where it is cached, as long as its holder lives."""

import asyncio

from redis import Redis

from e2e.client import Client, Prompt
from e2e.stack import Stack, until

PREFIX = [(7919 * index) % 40_000 + 200 for index in range(960)]
BLOCKS = len(PREFIX) // 16


async def test_the_holder_is_preferred_over_an_idle_worker_until_it_dies(
    twin: Stack, twin_client: Client
) -> None:
    ask = twin_client.complete
    first = await ask(PREFIX, max_tokens=4)
    assert first.cached_tokens == 0
    holder = twin.path(first.id).partition(">")[0]
    await asyncio.to_thread(_until_indexed, twin, holder)
    question = [*PREFIX, 400, 401, 402]
    # The holder gets something to do; beside it, the other one has nothing.
    load = asyncio.create_task(ask(_unrelated(700, 3), max_tokens=1))
    await asyncio.to_thread(until, lambda: _prompts(twin, holder) == 2, "the load on the holder")
    again, elsewhere = await asyncio.gather(
        ask(question, max_tokens=8), _after(0.1, ask, _unrelated(200, 5))
    )
    await load
    assert twin.path(load.result().id).partition(">")[0] == holder
    assert twin.path(again.id).partition(">")[0] == holder
    assert again.cached_tokens == len(PREFIX)
    assert twin.path(elsewhere.id).partition(">")[0] != holder, "load alone chose the holder"

    twin.kill_child(holder)
    afresh = await ask(question, max_tokens=8)
    assert afresh.cached_tokens == 0
    assert twin.answer_tokens(afresh.id) == twin.answer_tokens(again.id)
    assert afresh.text == again.text
    await asyncio.to_thread(twin.until_whole)


async def _after(seconds: float, ask: object, prompt: Prompt) -> object:
    """Submitted second, so that its own weight is not on the other worker."""
    await asyncio.sleep(seconds)
    return await ask(prompt, max_tokens=1)  # type: ignore[operator]


def _unrelated(length: int, step: int) -> list[int]:
    return [(step * 104_729 * (index + 1)) % 40_000 + 200 for index in range(length)]


def _prompts(stack: Stack, worker: str) -> int:
    """Prompts of this file that the worker was given in its present life."""
    told = [
        fields["message"]
        for _, name, fields in stack.story(worker)
        if name == "Received" and fields["message"]["type"] == "Prefill"
    ]
    return sum(len(message["prompt"]) in (4 * len(PREFIX), 4 * 700) for message in told)


def _until_indexed(stack: Stack, holder: str) -> None:
    """The index in the private Redis has every block of the prefix at this worker."""
    with Redis(unix_socket_path=str(stack.run_dir / "redis.sock")) as redis:

        def indexed() -> bool:
            worker = redis.hgetall(f"w:{holder}")
            if not worker:
                return False
            epoch = worker[b"epoch"].decode()
            return int(redis.scard(f"kvw:{holder}:{epoch}")) >= BLOCKS

        until(indexed, "the prefix in the index")
        entries = [redis.hgetall(key) for key in redis.scan_iter("kvb:*", count=1000)]
        assert sum(holder.encode() in entry for entry in entries) >= BLOCKS
