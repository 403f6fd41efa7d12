"""The prefill side of a hand-over: what is announced, and how long it stays where it is."""

import pytest

from core.builders import job_of, prefill
from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job
from slipstream.core.lender import Lender
from slipstream.core.machine import BatchDone, Row
from slipstream.messages import KvReady
from slipstream.types import TokenLogprobs

NUM_TOKENS = 40  # two full blocks and a tail
FIRST_TOKEN = 9
LEASE_S = 10.0


def digest(block: int) -> bytes:
    return bytes([block]) * 16


class Desk:
    def __init__(self) -> None:
        self.pool = BlockPool(12)
        self.lender = Lender(self.pool, epoch=7, lease_s=LEASE_S)

    def job(self, request_id: str = "r", attempt: int = 1, target: str = "decode-0") -> Job:
        message = prefill(request_id, range(NUM_TOKENS), attempt=attempt, target=target)
        job = job_of(message, "prefill-0")
        job.block_ids = self.pool.allocate(3) or []
        return job

    def chunk(self, job: Job, end: int = NUM_TOKENS, now_s: float = 0.0) -> KvReady:
        """A step has computed the job's tokens up to `end`."""
        start, job.num_computed = job.num_computed, end
        sample = end == NUM_TOKENS
        tokens = tuple(job.tokens[start:end])
        row = Row(job.request_id, job.attempt, tokens, start, tuple(job.block_ids), sample)
        done = BatchDone(1, (), {block: digest(block) for block in job.block_ids})
        first = TokenLogprobs(FIRST_TOKEN, -0.5) if sample else None
        if sample:
            job.append(FIRST_TOKEN, first)
        return self.lender.announce(job, row, done, first, now_s)

    def lent(self, *, now_s: float = 0.0, **fields: str | int) -> Job:
        """A job that is through: its own references are gone, the lease runs."""
        job = self.job(**fields)  # type: ignore[arg-type]
        self.chunk(job, now_s=now_s)
        self.pool.release(job.block_ids)
        return job

    @property
    def held(self) -> int:
        self.pool.check()
        return sum(count > 0 for count in self.pool.references)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_full_blocks_are_announced_as_they_fill_and_the_tail_with_the_last_chunk(
    desk: Desk,
) -> None:
    job = desk.job()
    a, b, c = job.block_ids
    job.cached_tokens = 16
    first, last = desk.chunk(job, 32), desk.chunk(job)
    assert (first.first_block, first.block_ids, first.num_tokens) == (0, [a, b], 32)
    assert first.digests == digest(a) + digest(b)
    assert (first.first_token, first.first_logprobs) == (None, None)
    assert (last.first_block, last.block_ids, last.num_tokens) == (2, [c], 40)
    assert (last.first_token, last.first_logprobs) == (9, TokenLogprobs(9, -0.5))
    assert first.lease_id == last.lease_id and first.epoch == 7
    assert first.cached_tokens == last.cached_tokens == 16
    assert desk.lender.table.granted == 1, "one lease for both"


def test_digests_of_full_blocks_are_kept_for_the_next_reader(desk: Desk) -> None:
    job = desk.job()
    a, b, c = job.block_ids
    desk.pool.digests[a] = b"computed before."
    assert desk.chunk(job).digests == b"computed before." + digest(b) + digest(c)
    assert [desk.pool.digests[block] for block in (b, c)] == [digest(b), None], "the tail grows on"


def test_a_lease_outlives_its_job_and_ends_at_the_readers_word(desk: Desk) -> None:
    job = desk.lent()
    assert desk.held == 3 and desk.lender.table.leased_blocks() == set(job.block_ids)
    assert not desk.lender.release("r/1", "decode-1", 4.0), "it is not the reader"
    assert desk.lender.release("r/1", "decode-0", 5.0)
    assert desk.held == 0
    assert not desk.lender.release("r/1", "decode-0", 5.0), "said again: nobody vouches for it"


@pytest.mark.parametrize(
    ("renewed_s", "released_s", "ok"),
    [
        ([], 9.9, True),
        ([], 10.0, False),
        ([2.0, 4.0, 13.0], 22.9, True),
        ([2.0, 4.0], 14.0, False),
        ([10.0], 11.0, False),  # a lease that has ended never lives again
    ],
)
def test_only_a_lease_that_lived_all_the_time_is_ok(
    desk: Desk, renewed_s: list[float], released_s: float, ok: bool
) -> None:
    desk.lent()
    for now_s in renewed_s:
        desk.lender.table.renew("r/1", now_s)
    assert desk.lender.release("r/1", "decode-0", released_s) == ok
    assert desk.held == 0


def test_a_lease_that_nobody_renews_lapses_and_frees_its_blocks(desk: Desk) -> None:
    desk.lent()
    desk.lent(request_id="s", now_s=1.0)
    assert desk.lender.lapse(10.5) == ["r/1"]
    assert desk.held == 3 and desk.lender.table.lapsed == 1
    assert not desk.lender.release("r/1", "decode-0", 10.5)


def test_no_lease_lapses_before_the_last_chunk(desk: Desk) -> None:
    job = desk.job()
    desk.chunk(job, 32)
    assert desk.lender.lapse(1e9) == []
    desk.chunk(job, now_s=1e9)
    assert desk.lender.lapse(1e9 + 9) == []


def test_a_drop_ends_the_leases_of_all_attempts_up_to_its_own(desk: Desk) -> None:
    for attempt in (1, 2, 3):
        desk.lent(attempt=attempt)
    desk.lent(request_id="r/1")  # another request, whose id looks like a lease of this one
    desk.lender.drop("r", 2)
    assert set(desk.lender.table.live) == {"r/3", "r/1/1"} and desk.held == 6


def test_a_silent_reader_loses_its_leases_and_nobody_elses(desk: Desk) -> None:
    desk.lent(request_id="a/b", attempt=4)
    desk.lent(request_id="other", target="decode-1")
    desk.chunk(desk.job("unfinished"), 16)
    assert desk.lender.reader_down("decode-0") == [("a/b", 4), ("unfinished", 1)]
    assert set(desk.lender.table.live) == {"other/1"}
    assert desk.held == 3 + 3, "what the unfinished job holds itself stays"
