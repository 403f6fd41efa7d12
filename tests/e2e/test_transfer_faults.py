"""What goes wrong between two workers while KV blocks travel, on a whole stack and by every
transport: no answer changes, the counter says what it was, and no block stays held."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from typing import Any, TypeAlias

import pytest
import pytest_asyncio

from e2e.client import Answer, Client, eventually
from e2e.faults import FaultyStack
from e2e.stack import until

PREFILL, DECODE = "prefill-0", "decode-0"
NO_NIXL = not (find_spec("nixl_cu12") or find_spec("nixl_cu13"))
TRANSPORTS = [
    "shm",
    "bus",
    pytest.param("nixl", marks=pytest.mark.skipif(NO_NIXL, reason="no package nixl")),
]
GREEDY: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 4321}
Asked: TypeAlias = list[tuple[list[int], dict[str, Any]]]
Texts: TypeAlias = dict[str, list[str]]


def words(length: int, step: int) -> list[int]:
    return [(step * 15_485_863 * (index + 1)) % 40_000 + 200 for index in range(length)]


SHORT: Asked = [
    (words(40, 1), {**GREEDY, "stream": True}),
    (words(95, 2), SEEDED),
    (words(33, 3), GREEDY),
    (words(64, 4), {**SEEDED, "stream": True}),
]
LONG: Asked = [
    (words(490, 5), {**GREEDY, "stream": True}),
    (words(440, 6), SEEDED),
    (words(50, 7), GREEDY),
]
"""The first two are more than one READ brings at once, by any transport."""


async def ask(client: Client, asked: Asked, salt: str) -> list[Answer]:
    """All at once. `salt`: nothing of another round is found in a cache."""
    told = [client.stream if body.get("stream") else None for _, body in asked]
    answers = []
    for (prompt, body), stream in zip(asked, told, strict=True):
        if stream is not None:
            answers.append(_followed(*stream(prompt, cache_salt=salt, **body)))
        else:
            answers.append(client.complete(prompt, cache_salt=salt, **body))
    return list(await asyncio.gather(*answers))


async def _followed(answer: Answer, following: "asyncio.Task[None]") -> Answer:
    await following
    return answer


def check(answers: list[Answer], texts: list[str]) -> None:
    for answer, text in zip(answers, texts, strict=True):
        assert answer.status == 200 and not answer.broken, (answer.error, answer.broken)
        assert not answer.error, answer.error
        assert answer.text == text
        assert answer.finish_reason == "length"
        assert answer.usage["completion_tokens"] == GREEDY["max_tokens"]


@pytest.fixture(scope="module")
def right() -> Texts:
    """What the first stack answers undisturbed; all the others have to say the same."""
    return {}


@pytest.fixture(scope="module", params=TRANSPORTS)
def stack(request: pytest.FixtureRequest, right: Texts) -> Iterator[FaultyStack]:
    """A prompt is computed in one step, so that its blocks come by one READ."""
    stack = FaultyStack(
        transports=request.param, kv_cache_bytes="384MiB", prefill_budget_tokens=2048
    )
    try:
        asyncio.run(_undisturbed(stack, right))
        yield stack
        stack.close()
    finally:
        stack.kill()


async def _undisturbed(stack: FaultyStack, right: Texts) -> None:
    async with Client(stack.url) as client:
        for name, asked in (("short", SHORT), ("long", LONG)):
            told = [answer.text for answer in await ask(client, asked, "undisturbed")]
            assert right.setdefault(name, told) == told


@pytest_asyncio.fixture
async def client(stack: FaultyStack) -> AsyncIterator[Client]:
    async with Client(stack.url) as client:
        yield client


class Watch:
    """What has changed since this was made."""

    def __init__(self, stack: FaultyStack, what: str):
        self._stack, self._what = stack, what
        self._failures = stack.failures(what)

    def failures(self) -> Counter[str]:
        return self._stack.failures(self._what) - self._failures


async def check_whole(stack: FaultyStack, client: Client, right: Texts) -> None:
    """All blocks are free, and the next requests go through the transfer as if nothing had been."""
    await asyncio.to_thread(stack.until_whole)
    pulled, failures = stack.total("blocks_pulled_total"), stack.failures("handover")
    answers = await ask(client, SHORT, f"after {pulled}")
    check(answers, right["short"])
    assert {stack.path(answer.id) for answer in answers} == {f"{PREFILL}>{DECODE}"}
    await asyncio.to_thread(
        until, lambda: stack.total("blocks_pulled_total") >= pulled + 16, "more blocks pulled"
    )
    assert stack.failures("handover") == failures


async def test_wrong_bytes_a_wrong_epoch_a_lost_lease(
    stack: FaultyStack, client: Client, right: Texts
) -> None:
    watch, reads = Watch(stack, "handover"), stack.read_errors(DECODE)
    for fault, spoilt in (("flip", DECODE), ("epoch", DECODE), ("lose", PREFILL)):
        stack.arm(spoilt, fault, 2)
        check(await ask(client, SHORT, fault), right["short"])
        assert stack.committed(spoilt, fault) == 2
    await check_whole(stack, client, right)
    # A READ with a flipped byte, and one under a lost lease, is a good one as far as it goes.
    assert (stack.read_errors(DECODE) - reads).keys() == {"", "epoch"}
    assert stack.read_errors(DECODE)["epoch"] - reads["epoch"] == 2
    assert watch.failures() == {"digest": 2, "read": 2, "expired": 2}


async def test_a_read_that_outlasts_its_lease(
    stack: FaultyStack, client: Client, right: Texts
) -> None:
    watch, lapsed = Watch(stack, "handover"), stack.total("leases_lapsed_total")
    stack.arm(DECODE, "hold")
    stack.mute(DECODE, True)
    asking = asyncio.create_task(ask(client, LONG, "late"))
    await asyncio.to_thread(stack.until_held, DECODE)
    await asyncio.to_thread(
        until, lambda: stack.total("leases_lapsed_total") > lapsed, "the lease is over"
    )
    stack.open_gate()
    check(await asking, right["long"])
    stack.mute(DECODE, False)
    await check_whole(stack, client, right)
    assert watch.failures().keys() == {"expired"}


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_lender_dies_or_hangs_in_mid_read(
    stack: FaultyStack, client: Client, right: Texts, blow: signal.Signals
) -> None:
    watch, reads = Watch(stack, "handover"), stack.read_errors(DECODE)
    stack.arm(DECODE, "hold")
    asking = asyncio.create_task(ask(client, LONG, blow.name))
    await asyncio.to_thread(stack.until_held, DECODE)
    stack.signal(PREFILL, blow)
    stack.open_gate()
    try:
        check(await asking, right["long"])
    finally:
        if blow is signal.SIGSTOP:
            stack.signal(PREFILL, signal.SIGCONT)
    print(stack.read_errors(DECODE) - reads, watch.failures())
    await check_whole(stack, client, right)
    print(stack.read_errors(DECODE) - reads, watch.failures())
    assert 0
