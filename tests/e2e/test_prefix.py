"""A prefix that lies anywhere is computed nowhere again, also when its first holder is dead."""

import asyncio

from e2e.client import Client
from e2e.stack import Stack, until

PREFIX = [(7919 * index) % 40_000 + 200 for index in range(960)]
BLOCKS = len(PREFIX) // 16
DECODE = "decode-0"


async def test_a_prefix_is_found_wherever_it_is_and_outlives_its_first_holder(
    twin: Stack, twin_client: Client
) -> None:
    ask = twin_client.complete
    first = await ask(PREFIX, max_tokens=4)
    assert first.cached_tokens == 0
    holder = _prefilled(twin, first.id)
    for worker in (holder, DECODE):
        await asyncio.to_thread(_until_indexed, twin, worker, BLOCKS)
    question = [*PREFIX, 400, 401, 402]
    again = await ask(question, max_tokens=8)
    assert again.cached_tokens == len(PREFIX)

    # Who else is asked has it from one of those that hold it.
    epoch = twin.epochs()[holder]
    twin.kill_child(holder)
    await asyncio.to_thread(until, lambda: twin.epochs().get(holder) != epoch, "its death is known")
    afresh = await ask(question, max_tokens=8)
    assert afresh.cached_tokens == len(PREFIX)
    assert _prefilled(twin, afresh.id) != DECODE
    await asyncio.to_thread(until, lambda: _fetched(twin), "blocks from another holder")
    assert twin.answer_tokens(afresh.id) == twin.answer_tokens(again.id)
    assert afresh.text == again.text
    await asyncio.to_thread(twin.until_whole)


async def test_a_chat_finds_what_was_generated_in_its_earlier_turns(
    twin: Stack, twin_client: Client
) -> None:
    """Answers lie with the decode worker alone; the next turn is computed by a prefill worker."""
    prompt = [(6007 * index) % 40_000 + 300 for index in range(320)]
    answer = await twin_client.complete(prompt, max_tokens=50, ignore_eos=True)
    spoken = twin.answer_tokens(answer.id)
    assert len(spoken) == 50
    history = [*prompt, *spoken]
    # The KV of the last token was never needed, and blocks are found whole.
    known = (len(history) - 1) // 16
    await asyncio.to_thread(_until_indexed, twin, DECODE, known)
    turn = await twin_client.complete([*history, 500, 501, 502], max_tokens=8)
    assert turn.cached_tokens == known * 16
    assert _prefilled(twin, turn.id) != DECODE

    # The same answer as without any cache: `salt` keeps it from what others have.
    alone = await twin_client.complete(
        [*history, 500, 501, 502], max_tokens=8, cache_salt="somebody else"
    )
    assert alone.cached_tokens == 0 and alone.text == turn.text


def _prefilled(stack: Stack, request_id: str) -> str:
    return stack.path(request_id).partition(">")[0]


def _fetched(stack: Stack) -> bool:
    """Whether a worker says that it had blocks from another one."""
    return any(stack.worker("blocks_fetched_total").values())


def _until_indexed(stack: Stack, worker: str, count: int) -> None:
    until(lambda: stack.indexed(worker) >= count, f"{count} blocks of {worker} in the index")
