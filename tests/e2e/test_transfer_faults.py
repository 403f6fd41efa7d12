"""What goes wrong between two workers while KV blocks travel, on a whole stack and by every
transport: no answer changes, the counter says what it was, and no block stays held."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
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


def some(*usual: str) -> list[Any]:
    """All transports; those that are not named here only where time does not matter."""
    no_nixl = pytest.mark.skipif(not NIXL, reason="no package nixl")
    return [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name not in usual) + [no_nixl] * (name == "nixl"),
        )
        for name in ("shm", "bus", "nixl")
    ]


EACH = some("shm", "bus", "nixl")
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
FILLER = (words(20, 8), {**SEEDED, "max_tokens": 64})


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


# --- Hand-over, from prefill to decode ------------------------------------------------------------


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
        assert len(pair.committed(spoilt, fault)) == 2
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
    pair.send(PREFILL, blow)
    pair.open_gate()
    try:
        answers = await asking
    finally:
        if blow is signal.SIGSTOP:
            pair.send(PREFILL, signal.SIGCONT)
    check(answers, right["long"])
    await _until_new(pair, PREFILL, old, blow)
    after = await check_whole(pair, client, right["short"], f"{blow.name} {transport}")
    assert (after - before) and (after - before).keys() <= {"peer", "read", MIGRATED}
    # Where the bytes are had without the peer's help, its death is noticed by its silence alone.
    causes = pair.reads(DECODE, answers).keys() - {""}
    if blow is signal.SIGKILL:
        assert not causes if transport == "shm" else causes <= {"timeout", "peer"} and causes
    else:
        assert causes <= ({"timeout"} if transport != "shm" else set())


# --- Fetch, from decode to decode -----------------------------------------------------------------


def two_holders() -> AbstractContextManager[FaultyStack]:
    """Two workers, each of which has room for one request."""
    return started(
        prefill=0,
        decode=2,
        disaggregation="never",
        max_num_seqs=1,
        kv_cache_bytes="384MiB",
        prefill_budget_tokens=1024,
    )


@pytest.fixture(scope="module")
def holders() -> Iterator[FaultyStack]:
    with two_holders() as stack:
        yield stack


@pytest.fixture
def slow_holders() -> Iterator[FaultyStack]:
    """Of one test: a READ that took seconds stays in the prices, and computing is cheaper then."""
    with two_holders() as stack:
        yield stack


@pytest.fixture(scope="module")
def lent(holders: FaultyStack) -> list[str]:
    return asyncio.run(undisturbed(holders, [FILLER, *LENT]))[0]


@pytest_asyncio.fixture
async def borrower(holders: FaultyStack) -> AsyncIterator[Client]:
    async with Client(holders.url) as client:
        yield client


class Loan:
    """One worker has a prefix, and no room: who asks for more of it is sent to the other one."""

    def __init__(self, stack: FaultyStack, client: Client, salt: str):
        self.stack, self.client, self.salt = stack, client, salt
        self.holder = self.borrower = ""
        self._filler: list[Any] = []

    async def __aenter__(self) -> "Loan":
        known = {name: self.stack.indexed(name) for name in ("decode-0", "decode-1")}
        first = await self.client.complete(PREFIX, max_tokens=1, cache_salt=self.salt)
        self.holder = holder = self.stack.path(first.id)
        (self.borrower,) = known.keys() - {holder}
        wanted = known[holder] + len(PREFIX) // 16
        await asyncio.to_thread(
            until, lambda: self.stack.indexed(holder) >= wanted, "the prefix in the index"
        )
        prompt, body = FILLER
        elsewhere = []
        for _ in range(2):
            answer, following = self.client.stream(prompt, cache_salt=self.salt, **body)
            await eventually(lambda answer=answer: answer.chunks > 0)
            if answer.headers["x-slipstream-path"] == holder:
                break
            elsewhere.append(following)
        self._filler = [answer, following]
        for other in elsewhere:
            other.cancel()
        assert answer.headers["x-slipstream-path"] == holder, "the other one was full"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._filler[1].cancel()

    async def ask(self) -> list[Answer]:
        """All that has been asked for, what fills the holder too."""
        answers = await ask(self.client, LENT, self.salt)
        answer, following = self._filler
        await following
        return [answer, *answers]


async def check_lends(stack: FaultyStack, client: Client, texts: list[str], salt: str) -> None:
    """The next prefix is fetched as if nothing had been, and all blocks are free."""
    await asyncio.to_thread(until, stack.serves, "ready")
    async with Loan(stack, client, salt) as loan:
        answers = await loan.ask()
    check(answers, texts)
    assert loan.borrower in {stack.path(answer.id) for answer in answers}
    assert {answer.cached_tokens for answer in answers[1:]} == {len(PREFIX) // 16 * 16}
    assert stack.reads(loan.borrower, answers) == {"": 1}
    await asyncio.to_thread(stack.until_whole)


@asynccontextmanager
async def mid_read(
    stack: FaultyStack, client: Client, texts: list[str], salt: str
) -> AsyncIterator[tuple[Loan, asyncio.Task[list[Answer]]]]:
    """A loan whose READ is held, and who asks. The router may decide to compute, by what it heard
    in time: then the answers are checked, and all begins anew, three times at most."""
    for attempt in range(3):
        async with Loan(stack, client, f"{salt} {attempt}") as loan:
            stack.arm(loan.borrower, "hold")
            asking = asyncio.create_task(loan.ask())
            if await asyncio.to_thread(stack.until_held, loan.borrower, asking.done):
                yield loan, asking
                return
            check(await asking, texts)
            stack.arm(loan.borrower, "hold", 0)
            for answer in await asking:
                print("no READ:", stack.path(answer.id), answer.headers, stack.failures("fetch"))
    raise AssertionError("no READ came of three loans")


async def test_a_flipped_byte_in_a_fetched_prefix(
    holders: FaultyStack, borrower: Client, lent: list[str]
) -> None:
    before = holders.failures("fetch")
    for transport in TRANSPORTS:
        holders.restrict(transport)
        async with Loan(holders, borrower, f"flip {transport}") as loan:
            holders.arm(loan.borrower, "flip")
            check(await loan.ask(), lent)
        assert len(holders.committed(loan.borrower, "flip")) == 1
    await check_lends(holders, borrower, lent, "after a flip")
    assert holders.failures("fetch") - before == {"digest": len(TRANSPORTS)}


@pytest.mark.parametrize("transport", some())
async def test_a_fetch_that_outlasts_its_lease(
    slow_holders: FaultyStack, lent: list[str], transport: str
) -> None:
    stack = slow_holders
    stack.restrict(transport)
    async with Client(stack.url) as client:
        async with mid_read(stack, client, lent, "late") as (loan, asking):
            lapsed = stack.worker("leases_lapsed_total")[loan.holder]
            stack.mute(loan.borrower, True)
            await asyncio.to_thread(
                until,
                lambda: stack.worker("leases_lapsed_total")[loan.holder] > lapsed,
                "the lease is over",
            )
            stack.open_gate()
            check(await asking, lent)
            stack.mute(loan.borrower, False)
        async with Loan(stack, client, "after") as loan:
            check(await loan.ask(), lent)
    await asyncio.to_thread(stack.until_whole)
    assert stack.failures("fetch") == {"expired": 1}


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL], ids=lambda blow: blow.name)
@pytest.mark.parametrize("transport", some("shm"))
async def test_the_holder_dies_or_hangs_in_mid_read(
    holders: FaultyStack, borrower: Client, lent: list[str], transport: str, blow: signal.Signals
) -> None:
    """Nobody waits for the READ, which goes on: its blocks are in quarantine until it is over."""
    holders.restrict(transport)
    epochs = holders.epochs()
    async with mid_read(holders, borrower, lent, f"{blow.name} {transport}") as (loan, asking):
        before = holders.failures("fetch", of=loan.borrower)
        holders.send(loan.holder, blow)
        try:
            check(await asking, lent)
            await asyncio.to_thread(
                until,
                lambda: holders.worker("blocks_quarantined").get(loan.borrower),
                "blocks in quarantine",
            )
        finally:
            holders.open_gate()
            if blow is signal.SIGSTOP:
                holders.send(loan.holder, signal.SIGCONT)
    await _until_new(holders, loan.holder, epochs[loan.holder], blow)
    await check_lends(holders, borrower, lent, f"after {blow.name} {transport}")
    failures = holders.failures("fetch", of=loan.borrower) - before
    assert failures.pop(MIGRATED, 0) <= 1, "what filled the holder begins anew elsewhere"
    assert failures == {"peer": 1}


async def _until_new(stack: FaultyStack, node_id: str, epoch: int, blow: signal.Signals) -> None:
    """What was killed has begun anew; what was stopped goes on."""
    if blow is signal.SIGKILL:
        await asyncio.to_thread(
            until, lambda: stack.epochs().get(node_id, epoch) != epoch, f"another {node_id}"
        )
