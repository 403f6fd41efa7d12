"""Forty prompts at once: the tokens and the text are those of Transformers, whatever the way."""

import asyncio
import re
from collections.abc import Iterator

import pytest

from e2e.client import Answer, Client
from e2e.reference import MAX_TOKENS, NUM_PROMPTS, TIE_GAP, Expected, Reference
from e2e.stack import Stack


@pytest.fixture(scope="module")
def bus_stack() -> Iterator[Stack]:
    stack = Stack(kv_cache_bytes="1GiB", transports="bus")
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def one_pool_stack() -> Iterator[Stack]:
    stack = Stack(kv_cache_bytes="1GiB", disaggregation="never")
    yield stack
    stack.close()


async def ask_all(stack: Stack, reference: Reference) -> list[tuple[Expected, Answer]]:
    asked = [(one.prompt, one) for one in reference.expected] + reference.texts
    assert len(asked) == NUM_PROMPTS
    async with Client(stack.url) as client:
        answers = await asyncio.gather(
            *(client.complete(prompt, max_tokens=MAX_TOKENS, timeout=600) for prompt, _ in asked)
        )
    return [(one, answer) for (_, one), answer in zip(asked, answers, strict=True)]


def check_all(stack: Stack, reference: Reference, told: list[tuple[Expected, Answer]]) -> None:
    """Equal, but for ties, which are shown to be ties, and of which none is expected."""
    ties = 0
    for one, answer in told:
        tokens = stack.answer_tokens(answer.id)
        assert answer.usage["prompt_tokens"] == len(one.prompt)
        assert answer.usage["completion_tokens"] == len(tokens)
        if tokens == one.tokens:
            assert answer.text == one.text
            assert answer.finish_reason == ("stop" if tokens[-1] in reference.ends else "length")
            continue
        pairs = zip(tokens, one.tokens, strict=False)
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        assert same is not None, f"{len(tokens)} tokens for {len(one.tokens)}"
        gap = reference.gap(one.prompt + one.tokens[:same])
        assert gap < TIE_GAP, (
            f"{len(one.prompt)} prompt tokens, {stack.path(answer.id)}: output token {same} is "
            f"{tokens[same]} for {one.tokens[same]}, gap {gap}"
        )
        ties += 1
    assert ties <= 1


async def cold_and_warm(
    stack: Stack, reference: Reference, pools: int = 1
) -> list[tuple[Expected, Answer]]:
    """What both rounds were told. In the second one every full block is found, unless there is
    another pool where computing a short prompt was cheaper."""
    cold = await ask_all(stack, reference)
    check_all(stack, reference, cold)
    warm = await ask_all(stack, reference)
    check_all(stack, reference, warm)
    full = [(len(one.prompt) - 1) // 16 * 16 for one, _ in warm]
    cached = [answer.cached_tokens for _, answer in warm]
    assert cached == full if pools == 1 else sum(full) / 2 < sum(cached) <= sum(full)
    stack.until_settled()
    return cold + warm


async def check_handed_over(stack: Stack, reference: Reference, transport: str) -> None:
    before, failed = stack.worker("blocks_pulled_total").get("decode-0", 0), failures(stack)
    told = await cold_and_warm(stack, reference)
    # An end at the first token leaves nothing to be decoded.
    paths = {stack.path(answer.id) for one, answer in told if len(one.tokens) > 1}
    assert paths == {"prefill-0>decode-0"}
    pulls = [fields for _, name, fields in stack.story("decode-0") if name == "PullDone"]
    assert pulls and all(fields["error"] is None for fields in pulls)
    # Each full block once, for the decode worker keeps them too; a partial one each time.
    distinct = {
        tuple(one.prompt[: 16 * (index + 1)])
        for one, _ in told
        for index in range(len(one.prompt) // 16)
    }
    partial = sum(len(one.prompt) % 16 > 0 for one, _ in told)
    assert stack.worker("blocks_pulled_total")["decode-0"] - before >= len(distinct) + partial
    assert set(re.findall(r"KV blocks of \S+ come by (\w+)", stack.log)) == {transport}
    assert failures(stack) == failed


def failures(stack: Stack) -> dict[tuple[str, str], float]:
    """Hand-overs that failed, by worker and cause."""
    return {key: n for key, n in stack.gauges().items() if "worker_handover_" in key[1]}


async def test_every_prompt_through_shared_memory(reference: Reference, stack: Stack) -> None:
    await check_handed_over(stack, reference, "shm")


async def test_every_prompt_over_the_bus(reference: Reference, bus_stack: Stack) -> None:
    await check_handed_over(bus_stack, reference, "bus")


@pytest.mark.slow
async def test_every_prompt_in_one_pool(reference: Reference, one_pool_stack: Stack) -> None:
    told = await cold_and_warm(one_pool_stack, reference, pools=2)
    assert {one_pool_stack.path(answer.id) for _, answer in told} <= {"prefill-0", "decode-0"}
    assert not sum(one_pool_stack.worker("blocks_pulled_total").values())
