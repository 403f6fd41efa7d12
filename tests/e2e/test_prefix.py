"""A long prefix is prefilled where it is cached, as long as its holder lives."""

import asyncio

from redis import Redis

from e2e.client import Client
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
    await asyncio.to_thread(until, lambda: _placed(twin, 700) == holder, "the load on the holder")
    asked = asyncio.create_task(ask(question, max_tokens=8))
    await asyncio.to_thread(until, lambda: _placed(twin, len(question)), "the question placed")
    elsewhere = await ask(_unrelated(200, 5), max_tokens=1)
    again = await asked
    await load
    assert twin.path(load.result().id).partition(">")[0] == holder
    assert twin.path(again.id).partition(">")[0] == holder
    assert again.cached_tokens == len(PREFIX)
    assert twin.path(elsewhere.id).partition(">")[0] != holder, "load alone chose the holder"

    epoch = twin.epochs()[holder]
    twin.kill_child(holder)
    # Sent sooner, its first attempt would be lost, and the next could find what that one computed.
    await asyncio.to_thread(until, lambda: twin.epochs().get(holder) != epoch, "its death is known")
    afresh = await ask(question, max_tokens=8)
    assert afresh.cached_tokens == 0
    assert twin.answer_tokens(afresh.id) == twin.answer_tokens(again.id)
    assert afresh.text == again.text
    await asyncio.to_thread(twin.until_whole)


def _unrelated(length: int, step: int) -> list[int]:
    return [(step * 104_729 * (index + 1)) % 40_000 + 200 for index in range(length)]


def _placed(stack: Stack, length: int) -> str:
    """The prefill worker that the last prompt of this length was given to; empty: none yet."""
    given = [
        fields["to"]
        for _, name, fields in stack.story("scheduler")
        if name == "Send"
        and fields["message"]["type"] == "Prefill"
        and len(fields["message"]["prompt"]) == 4 * length
    ]
    return given[-1] if given else ""


def _until_indexed(stack: Stack, holder: str) -> None:
    """The index in the private Redis has every block of the prefix at this worker."""
    with Redis(unix_socket_path=str(stack.run_dir / "redis.sock")) as redis:

        def indexed() -> bool:
            (*_, key) = [b"", *redis.scan_iter(f"kvw:*:{holder}")]
            return sum(len(field) == 16 for field in redis.hkeys(key)) >= BLOCKS

        until(indexed, "the prefix in the index")
