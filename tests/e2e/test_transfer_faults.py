"""What goes wrong between two workers while KV blocks travel, on a whole stack and by every
transport: no answer changes, the counter says what it was, and no block stays held."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeAlias

import pytest
import pytest_asyncio

from e2e.client import Answer, Client, eventually
from e2e.faults import MIGRATED, FaultyStack
from e2e.stack import until

PREFILL, DECODE = "prefill-0", "decode-0"
NIXL = bool(find_spec("nixl_cu12") or find_spec("nixl_cu13"))
TRANSPORTS = ["shm", "bus", *(["nixl"] if NIXL else [])]
EACH = [
    "shm",
    "bus",
    pytest.param("nixl", marks=pytest.mark.skipif(not NIXL, reason="no package nixl")),
]
GREEDY: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 4321}
Asked: TypeAlias = list[tuple[list[int], dict[str, Any]]]


def words(length: int, step: int) -> list[int]:
    return [(step * 15_485_863 * (index + 1)) % 40_000 + 200 for index in range(length)]


SHORT: Asked = [
    (words(40, 1), {**GREEDY, "stream": True}),
    (words(95, 2), SEEDED),
    (words(33, 3), GREEDY),
    (words(64, 4), {**SEEDED, "stream": True}),
]
LONG: Asked = [(words(420, 5), {**SEEDED, "stream": True}), (words(95, 6), GREEDY)]
"""The first is more than any transport brings at once."""
PREFIX = words(418, 7)
LENT: Asked = [
    ([*PREFIX, 400, 401], {**GREEDY, "stream": True}),
    ([*PREFIX, 402], SEEDED),
]


async def ask(client: Client, asked: Asked, salt: str) -> list[Answer]:
    """All at once. `salt`: what is cached under another one is not found."""
    return list(await asyncio.gather(*(_ask(client, *one, salt) for one in asked)))


async def _ask(client: Client, prompt: list[int], body: dict[str, Any], salt: str) -> Answer:
    if not body.get("stream"):
        return await client.complete(prompt, cache_salt=salt, **body)
    answer, following = client.stream(prompt, cache_salt=salt, **body)
    await following
    return answer


def check(answers: list[Answer], texts: list[str]) -> None:
    for answer, text in zip(answers, texts, strict=True):
        assert answer.status == 200 and not answer.broken, (answer.error, answer.broken)
        assert not answer.error, answer.error
        assert answer.text == text
        assert answer.finish_reason == "length"
        assert answer.usage["completion_tokens"] == GREEDY["max_tokens"]


@contextmanager
def started(**settings: Any) -> Iterator[FaultyStack]:
    stack = FaultyStack(transports=",".join(TRANSPORTS), **settings)
    try:
        yield stack
        stack.close()
    finally:
        stack.kill()


async def undisturbed(stack: FaultyStack, *rounds: Asked) -> list[list[str]]:
    async with Client(stack.url) as client:
        told = [await ask(client, asked, "undisturbed") for asked in rounds]
    return [[answer.text for answer in answers] for answers in told]


# --- Hand-over, from prefill to decode -------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[FaultyStack]:
    """A prompt is computed in one step, so that its blocks come by one READ."""
    with started(kv_cache_bytes="384MiB", prefill_budget_tokens=1024) as stack:
        yield stack


@pytest.fixture(scope="module")
def right(pair: FaultyStack) -> dict[str, list[str]]:
    short, long = asyncio.run(undisturbed(pair, SHORT, LONG))
    return {"short": short, "long": long}


@pytest_asyncio.fixture
async def client(pair: FaultyStack) -> AsyncIterator[Client]:
    async with Client(pair.url) as client:
        yield client


async def check_whole(
    stack: FaultyStack, client: Client, texts: list[str], salt: str
) -> Counter[str]:
    """The next requests go through the transfer as if nothing had been, and all blocks are free.
    Returns the failures."""
    await asyncio.to_thread(until, stack.serves, "ready")
    answers = await ask(client, SHORT, f"{salt}, after it")
    check(answers, texts)
    assert {stack.path(answer.id) for answer in answers} == {f"{PREFILL}>{DECODE}"}
    await asyncio.to_thread(stack.until_whole)
    assert stack.reads(DECODE, answers) == {"": len(SHORT)}
    return stack.failures("handover")


@pytest.mark.parametrize("transport", EACH)
async def test_wrong_bytes_a_wrong_epoch_a_lost_lease(
    pair: FaultyStack, client: Client, right: dict[str, list[str]], transport: str
) -> None:
    pair.restrict(transport)
    before = pair.failures("handover")
    for fault, spoilt in (("flip", DECODE), ("epoch", DECODE), ("lose", PREFILL)):
        pair.arm(spoilt, fault, 2)
        answers = await ask(client, SHORT, f"{fault} {transport}")
        check(answers, right["short"])
        assert pair.committed(spoilt, fault) == 2
        # The transport judges epochs; of the other two faults it sees nothing.
        seen = {"": 2, "epoch": 2} if fault == "epoch" else {"": 4}
        assert pair.reads(DECODE, answers) == seen
    after = await check_whole(pair, client, right["short"], f"wrong {transport}")
    assert after - before == {"digest": 2, "read": 2, "expired": 2}


@pytest.mark.parametrize("transport", EACH)
async def test_a_read_that_outlasts_its_lease(
    pair: FaultyStack, client: Client, right: dict[str, list[str]], transport: str
) -> None:
    pair.restrict(transport)
    before, lapsed = pair.failures("handover"), pair.worker("leases_lapsed_total")[PREFILL]
    pair.arm(DECODE, "hold")
    pair.mute(DECODE, True)
    asking = asyncio.create_task(ask(client, LONG, f"late {transport}"))
    await asyncio.to_thread(pair.until_held, DECODE)
    await asyncio.to_thread(
        until, lambda: pair.worker("leases_lapsed_total")[PREFILL] > lapsed, "the lease is over"
    )
    pair.open_gate()
    check(await asking, right["long"])
    pair.mute(DECODE, False)
    after = await check_whole(pair, client, right["short"], f"late {transport}")
    assert (after - before).keys() == {"expired"}


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL], ids=lambda blow: blow.name)
@pytest.mark.parametrize("transport", EACH)
async def test_the_lender_dies_or_hangs_in_mid_read(
    pair: FaultyStack,
    client: Client,
    right: dict[str, list[str]],
    transport: str,
    blow: signal.Signals,
) -> None:
    """Who notices first acts: decode goes on from the tokens, or the scheduler from the journal."""
    pair.restrict(transport)
    before = pair.failures("handover")
    old = pair.epochs()[PREFILL]
    pair.arm(DECODE, "hold")
    asking = asyncio.create_task(ask(client, LONG, f"{blow.name} {transport}"))
    await asyncio.to_thread(pair.until_held, DECODE)
    pair.signal(PREFILL, blow)
    pair.open_gate()
    try:
        answers = await asking
    finally:
        if blow is signal.SIGSTOP:
            pair.signal(PREFILL, signal.SIGCONT)
    check(answers, right["long"])
    if blow is signal.SIGKILL:
        died = lambda: pair.epochs().get(PREFILL, old) != old  # noqa: E731
        await asyncio.to_thread(until, died, "another prefill worker")
    after = await check_whole(pair, client, right["short"], f"{blow.name} {transport}")
    print("CAUSES", transport, blow.name, after - before, pair.reads(DECODE, answers))
    assert (after - before) and (after - before).keys() <= {"peer", "read", MIGRATED}


# --- Fetch, from decode to decode ------------------------------------------------------------------


@pytest.fixture(scope="module")
def holders() -> Iterator[FaultyStack]:
    """Two workers, each of which has room for two requests."""
    with started(
        prefill=0,
        decode=2,
        disaggregation="never",
        max_num_seqs=2,
        kv_cache_bytes="384MiB",
        prefill_budget_tokens=1024,
    ) as stack:
        yield stack


@pytest.fixture(scope="module")
def lent(holders: FaultyStack) -> list[str]:
    return asyncio.run(undisturbed(holders, LENT))[0]


@pytest_asyncio.fixture
async def borrower(holders: FaultyStack) -> AsyncIterator[Client]:
    async with Client(holders.url) as client:
        yield client


async def occupied(stack: FaultyStack, client: Client, salt: str) -> tuple[str, str, list[Any]]:
    """One worker has the prefix and no room, so that whoever asks for more is sent to the other
    one. Returns both, and the streams that take the room."""
    names = sorted(stack.worker("steps"))
    count = {name: stack.indexed(name) for name in names}
    first = await client.complete(PREFIX, max_tokens=1, cache_salt=salt)
    holder = stack.path(first.id)
    (other,) = set(names) - {holder}
    blocks = len(PREFIX) // 16
    await asyncio.to_thread(
        until, lambda: stack.indexed(holder) >= count[holder] + blocks, "the prefix in the index"
    )
    fillers = []
    for token in (500, 501):
        endless = {**GREEDY, "max_tokens": 400, "cache_salt": salt}
        answer, following = client.stream([*PREFIX, token], **endless)
        await eventually(lambda answer=answer: answer.chunks > 0)
        assert answer.headers["x-slipstream-path"] == holder
        fillers.append(following)
    return holder, other, fillers


async def leave(fillers: list[Any]) -> None:
    for following in fillers:
        following.cancel()
    await asyncio.gather(*fillers, return_exceptions=True)


async def check_lent(stack: FaultyStack, client: Client, texts: list[str], salt: str) -> None:
    """The next prefix is fetched as if nothing had been, and all blocks are free."""
    await asyncio.to_thread(stack.until_whole)
    before, fetched = stack.failures("fetch"), stack.total("blocks_fetched_total")
    _, other, fillers = await occupied(stack, client, f"{salt}, after it")
    answers = await ask(client, LENT, f"{salt}, after it")
    check(answers, texts)
    assert {stack.path(answer.id) for answer in answers} == {other}
    await leave(fillers)
    await asyncio.to_thread(stack.until_whole)
    assert stack.failures("fetch") == before
    assert stack.total("blocks_fetched_total") >= fetched + len(PREFIX) // 16


@pytest.mark.parametrize("transport", EACH)
@pytest.mark.parametrize("fault", ["flip", "late", "SIGSTOP", "SIGKILL"])
async def test_a_fetch_that_goes_wrong_is_computed(
    holders: FaultyStack, borrower: Client, lent: list[str], fault: str, transport: str
) -> None:
    holders.restrict(transport)
    salt = f"{fault} {transport}"
    before = holders.failures("fetch")
    holder, other, fillers = await occupied(holders, borrower, salt)
    if fault == "flip":
        holders.arm(other, "flip", 2)
        check(await ask(borrower, LENT, salt), lent)
        assert holders.committed(other, "flip") == 2
        await leave(fillers)
    else:
        await _held(holders, borrower, lent, fault, salt, holder, other, fillers)
    await check_lent(holders, borrower, lent, salt)
    print("CAUSES", transport, fault, holders.failures("fetch") - before)
    assert 0


async def _held(
    stack: FaultyStack, client: Client, texts: list[str], fault: str, salt: str, holder: str,
    other: str, fillers: list[Any],
) -> None:
    lapsed = stack.worker("leases_lapsed_total")[holder]
    stack.arm(other, "hold")
    if fault == "late":
        stack.mute(other, True)
    asking = asyncio.create_task(ask(client, LENT, salt))
    await asyncio.to_thread(stack.until_held, other)
    if fault == "late":
        await asyncio.to_thread(
            until, lambda: stack.worker("leases_lapsed_total")[holder] > lapsed, "lease over"
        )
        stack.open_gate()
        check(await asking, texts)
        stack.mute(other, False)
        await leave(fillers)
        return
    stack.signal(holder, signal.Signals[fault])
    check(await asking, texts)
    assert stack.worker("blocks_quarantined")[other] > 0
    stack.open_gate()
    await leave(fillers)
    if fault == "SIGSTOP":
        stack.signal(holder, signal.SIGCONT)
