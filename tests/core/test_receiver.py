"""The decode side of a hand-over: nothing is used that was not read whole and confirmed."""

from collections.abc import Callable

import msgspec
import pytest

from core.builders import decode, job_of
from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job
from slipstream.core.machine import Effect, PullBlocks, PullDone, Send
from slipstream.core.reading import Reads
from slipstream.core.receiver import EARLY_KEEP_S, EARLY_MAX, Receiver
from slipstream.messages import KvReady, Release, Renew

NUM_TOKENS = 40  # two full blocks and a tail
THERE = [21, 22, 23]
"""The source's blocks."""
FIRST_TOKEN = 9
RELEASE = [Send("prefill-0", Release(lease_id="r/1", epoch=7))]


def digests(blocks: list[int]) -> list[bytes]:
    return [bytes([block]) * 16 for block in blocks]


def ready(first: int = 0, end: int = 3, **changes: object) -> KvReady:
    """The announcement of the blocks from `first` to `end`."""
    last = end == len(THERE)
    message = KvReady(
        request_id="r",
        attempt=1,
        lease_id="r/1",
        epoch=7,
        first_block=first,
        block_ids=THERE[first:end],
        digests=b"".join(digests(THERE[first:end])),
        num_tokens=NUM_TOKENS if last else end * 16,
        first_token=FIRST_TOKEN if last else None,
        cached_tokens=16,
    )
    return msgspec.structs.replace(message, **changes)


class Desk:
    def __init__(self, num_blocks: int = 8):
        self.now_s = 0.0
        self.pool = BlockPool(num_blocks)
        self.desk = Reads(self.pool, pull_timeout_s=3.0)
        self.receiver = Receiver(self.desk)
        self.job = self.expect("r")
        self.reads = 0

    def expect(self, request_id: str, num_tokens: int = NUM_TOKENS) -> Job:
        job = job_of(decode(request_id, range(num_tokens), source="prefill-0"))
        self.receiver.expect(job, "prefill-0", 7, self.now_s)
        return job

    def cache(self, num_blocks: int) -> list[int]:
        """Leading blocks of the prompt are here already."""
        blocks = self.pool.allocate(num_blocks)
        assert blocks is not None
        hashes = job_of(decode(prompt=range(48))).full_hashes(48)
        for position, (block, block_hash) in enumerate(zip(blocks, hashes, strict=False)):
            self.pool.commit(block, block_hash, position)
        self.pool.release(blocks)
        return blocks

    def announce(self, message: KvReady) -> list[Effect]:
        return self.receiver.announced("prefill-0", message, self.now_s)

    def pulled(self, blocks: list[int], error: str | None = None) -> list[Effect]:
        """The READ in flight ends; `blocks`: whose bytes it found."""
        self.reads += 1
        done = PullDone(f"r/1/{self.reads}", tuple(digests(blocks)), error=error)
        return [] if self.desk.over(done) else self.receiver.pulled(done, self.now_s)

    @property
    def held(self) -> int:
        self.pool.check()
        return sum(count > 0 for count in self.pool.references)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def reads(effects: list[Effect]) -> tuple[list[int], int]:
    """What the only effect reads: the source's blocks, and how many of ours."""
    (pull,) = effects
    assert isinstance(pull, PullBlocks)
    assert (pull.peer, pull.epoch, pull.timeout_s) == ("prefill-0", 7, 3.0)
    return list(pull.source_blocks), len(pull.local_blocks)


def assert_recomputes(desk: Desk, cause: str) -> None:
    receiver, job = desk.receiver, desk.job
    assert receiver.recompute == [job] and not receiver.ready and not receiver.live
    assert (job.tokens[-1], job.num_computed, job.block_ids) == (FIRST_TOKEN, 0, [])
    assert desk.held == 0 and desk.pool.hashes() == [], "nothing of it is found by a prefix"
    assert dict(receiver.failures) == {cause: 1}


# --- All is well ----------------------------------------------------------------------------------


def test_all_at_once(desk: Desk) -> None:
    assert reads(desk.announce(ready())) == (THERE, 3)
    assert desk.pulled(THERE) == RELEASE
    assert desk.receiver.ready == [], "read, but not confirmed"
    assert desk.receiver.released("r/1", True) == []
    job = desk.job
    assert desk.receiver.ready == [job] and not desk.receiver.live
    assert (job.num_computed, job.tokens[-1], len(job.tokens)) == (40, FIRST_TOKEN, 41)
    assert job.cached_tokens == 16 and desk.receiver.blocks_pulled == 3
    known = [desk.pool.digests[block] for block in job.block_ids]
    assert known == [*digests(THERE[:2]), None], "the tail will be written to"


def test_by_chunks_one_read_at_a_time(desk: Desk) -> None:
    assert reads(desk.announce(ready(0, 1))) == ([21], 1)
    assert desk.announce(ready(1, 2)) == []
    assert desk.announce(ready(2, 3)) == []
    assert reads(desk.pulled([21])) == ([22, 23], 2)
    assert desk.pulled([22, 23]) == RELEASE


def test_a_chunk_in_time_is_read_while_the_next_one_is_computed(desk: Desk) -> None:
    assert reads(desk.announce(ready(0, 2))) == ([21, 22], 2)
    assert desk.pulled([21, 22]) == []
    assert reads(desk.announce(ready(2, 3))) == ([23], 1)


@pytest.mark.parametrize("cached", [1, 2])
def test_what_is_cached_here_is_not_read(desk: Desk, cached: int) -> None:
    blocks = desk.cache(cached)
    assert reads(desk.announce(ready())) == (THERE[cached:], 3 - cached)
    assert desk.job.block_ids[:cached] == blocks


def test_without_anything_to_read_the_lease_is_given_back_at_once() -> None:
    desk = Desk()
    desk.receiver.drop("r")
    desk.job = desk.expect("r", num_tokens=48)
    desk.cache(3)
    assert desk.announce(ready(num_tokens=48)) == RELEASE
    desk.receiver.released("r/1", True)
    assert desk.receiver.ready == [desk.job]


# --- Failures -------------------------------------------------------------------------------------


def wrong_bytes(desk: Desk) -> list[Effect]:
    desk.announce(ready())
    return desk.pulled([21, 99, 23])


def too_few_digests(desk: Desk) -> list[Effect]:
    desk.announce(ready())
    return desk.pulled([21, 22])


def failed_read(desk: Desk) -> list[Effect]:
    desk.announce(ready())
    return desk.pulled([], error="timeout")


def failed_early_read(desk: Desk) -> list[Effect]:
    desk.announce(ready(0, 1))
    assert desk.pulled([], error="timeout") == [], "the first token is still to come"
    assert desk.announce(ready(1, 2)) == [], "nothing more is read"
    return desk.announce(ready(2, 3))


def expired(desk: Desk) -> list[Effect]:
    desk.announce(ready())
    assert desk.pulled(THERE) == RELEASE
    return desk.receiver.released("r/1", False) + RELEASE  # it was said before


@pytest.mark.parametrize(
    ("way", "cause"),
    [
        (wrong_bytes, "digest"),
        (too_few_digests, "digest"),
        (failed_read, "read"),
        (failed_early_read, "read"),
        (expired, "expired"),
    ],
)
def test_after_a_failure_the_tokens_are_all_that_is_used(
    desk: Desk, way: Callable[[Desk], list[Effect]], cause: str
) -> None:
    assert way(desk) == RELEASE
    assert_recomputes(desk, cause)


@pytest.mark.parametrize(
    "message",
    [
        ready(digests=b"x" * 32),
        ready(block_ids=[21, 22, 23, 24], digests=b"x" * 64),
        ready(block_ids=[21, 22], digests=b"x" * 32),
        ready(num_tokens=39),
    ],
    ids=["digests", "too many blocks", "too few blocks", "tokens"],
)
def test_a_malformed_announcement_is_not_read(desk: Desk, message: KvReady) -> None:
    assert desk.announce(message) == RELEASE
    assert_recomputes(desk, "malformed")


def test_more_blocks_than_the_prompt_has_are_not_read_either(desk: Desk) -> None:
    assert desk.announce(ready(0, 2, block_ids=[21, 22, 23, 24], digests=b"x" * 64)) == []
    assert desk.held == 0 and not desk.receiver.recompute, "the first token is still to come"


@pytest.mark.parametrize(
    "changes",
    [{"attempt": 2}, {"epoch": 8}, {"first_block": 1}, {"request_id": "other"}],
    ids=["another attempt", "another epoch", "a gap", "another request"],
)
def test_an_announcement_for_something_else_changes_nothing(
    desk: Desk, changes: dict[str, object]
) -> None:
    assert desk.announce(ready(**changes)) == []
    assert desk.held == 0 and not desk.job.block_ids
    assert reads(desk.announce(ready())) == (THERE, 3)


def test_what_is_said_twice_counts_once(desk: Desk) -> None:
    desk.announce(ready())
    assert desk.announce(ready()) == []
    assert desk.pulled(THERE) == RELEASE
    assert desk.receiver.pulled(PullDone("r/1/1", tuple(digests(THERE))), desk.now_s) == []
    assert desk.announce(ready()) == []
    desk.receiver.released("r/1", True)
    assert desk.receiver.released("r/1", True) == []
    assert desk.receiver.ready == [desk.job] and desk.job.tokens.count(FIRST_TOKEN) == 2
    # once in the prompt of 0..39, once sampled


def test_only_a_lease_that_was_given_back_can_be_confirmed(desk: Desk) -> None:
    desk.announce(ready())
    assert desk.receiver.released("r/1", True) == [] and not desk.receiver.ready


# --- The source is lost ---------------------------------------------------------------------------


def test_without_the_first_token_nothing_goes_on_when_the_source_is_lost(desk: Desk) -> None:
    desk.announce(ready(0, 2))
    assert desk.receiver.source_down("prefill-1") == []
    assert desk.receiver.source_down("prefill-0") == [desk.job]
    assert not desk.receiver.recompute


def test_with_the_first_token_it_is_computed_here(desk: Desk) -> None:
    desk.announce(ready())
    assert desk.receiver.source_down("prefill-0") == []
    assert desk.receiver.recompute == [desk.job] and desk.job.block_ids == []
    assert desk.held == 3, "the READ may still write"
    assert desk.pulled(THERE) == [], "what it brought is nobody's"
    assert_recomputes(desk, "peer")


# --- Silence --------------------------------------------------------------------------------------


def test_a_read_that_does_not_end_is_not_waited_for(desk: Desk) -> None:
    """The executor promises to end it at 3 s; whoever waits for it does not rely on that."""
    desk.announce(ready())
    desk.now_s = 3.9
    assert desk.receiver.expire(desk.now_s) == [] and not desk.receiver.recompute
    desk.now_s = 4.0
    assert desk.receiver.expire(desk.now_s) == RELEASE
    assert desk.receiver.recompute == [desk.job] and desk.job.block_ids == []
    assert desk.held == 3 and dict(desk.receiver.failures) == {"silent": 1}
    assert desk.desk.stuck(3.9) == "" and desk.desk.stuck(4.0) == "r/1/1"
    assert desk.pulled(THERE) == [] and desk.desk.stuck(9.0) == ""
    assert_recomputes(desk, "silent")


def test_without_the_first_token_a_read_that_does_not_end_waits_for_it(desk: Desk) -> None:
    desk.announce(ready(0, 2))
    desk.now_s = 5.0
    assert desk.receiver.expire(desk.now_s) == [] and not desk.receiver.recompute
    assert desk.announce(ready(2)) == RELEASE
    assert desk.receiver.recompute == [desk.job] and desk.held == 3
    assert desk.pulled(THERE[:2]) == []
    assert_recomputes(desk, "silent")


def test_a_source_that_lives_and_does_not_confirm_is_not_waited_for(desk: Desk) -> None:
    desk.announce(ready())
    desk.now_s = 2.0
    assert desk.pulled(THERE) == RELEASE
    assert desk.receiver.expire(5.9) == [] and not desk.receiver.recompute
    assert desk.receiver.expire(6.0) == []
    assert_recomputes(desk, "silent")
    assert desk.receiver.released("r/1", True) == [] and not desk.receiver.ready


def test_nothing_is_overdue_while_the_source_computes(desk: Desk) -> None:
    desk.announce(ready(0, 2))
    desk.pulled(THERE[:2])
    assert desk.receiver.expire(1e6) == []
    assert reads(desk.announce(ready(2))) == (THERE[2:], 1)


# --- Announcements that overtake their `Decode` ---------------------------------------------------


def test_an_announcement_waits_for_its_decode_and_no_other(desk: Desk) -> None:
    def early(attempt: int, source: str = "prefill-0") -> None:
        message = ready(request_id="s", attempt=attempt, lease_id=f"s/{attempt}")
        desk.receiver.overtook(source, message, 0.0)

    early(2), early(1), early(3), early(2, "prefill-1")
    job = job_of(decode("s", range(NUM_TOKENS), attempt=2, source="prefill-0"))
    (pull,) = desk.receiver.expect(job, "prefill-0", 7, 1.0)
    assert isinstance(pull, PullBlocks) and pull.pull_id == "s/2/1"
    assert [message.attempt for _, _, message in desk.receiver.early] == [1, 3]
    desk.receiver.expire(EARLY_KEEP_S)
    assert not desk.receiver.early


def test_early_announcements_are_bounded_by_the_newest(desk: Desk) -> None:
    for count in range(EARLY_MAX + 5):
        desk.receiver.overtook("prefill-0", ready(request_id="s", attempt=count), 0.0)
    assert len(desk.receiver.early) == EARLY_MAX
    assert desk.receiver.early[0][2].attempt == 5


def test_the_word_of_a_lost_source_is_not_waited_for(desk: Desk) -> None:
    desk.announce(ready())
    desk.pulled(THERE)
    desk.receiver.source_down("prefill-0")
    assert_recomputes(desk, "peer")
    assert desk.receiver.released("r/1", True) == [] and not desk.receiver.ready


# --- Dropped --------------------------------------------------------------------------------------


def test_blocks_of_a_running_read_are_in_quarantine(desk: Desk) -> None:
    desk.announce(ready())
    assert desk.receiver.drop("r") == RELEASE
    assert desk.held == 3 and not desk.receiver.live
    assert desk.pulled(THERE) == []
    assert desk.held == 0 and not desk.receiver.ready and not desk.receiver.recompute


def test_a_new_attempt_is_not_mixed_up_with_a_read_of_the_old_one(desk: Desk) -> None:
    desk.announce(ready())
    desk.receiver.drop("r")
    again = job_of(decode("r", range(NUM_TOKENS), attempt=2, source="prefill-0"))
    desk.receiver.expect(again, "prefill-0", 7, desk.now_s)
    (pull,) = desk.announce(ready(attempt=2, lease_id="r/2"))
    assert isinstance(pull, PullBlocks) and pull.pull_id != "r/1/1"
    assert desk.held == 6
    assert desk.pulled(THERE) == [] and desk.held == 3


def test_a_drop_gives_back_what_is_held_and_the_lease_if_there_is_one(desk: Desk) -> None:
    desk.expect("silent")
    assert desk.receiver.drop("silent") == [] and desk.receiver.drop("unknown") == []
    desk.announce(ready(0, 1))
    desk.pulled([21])
    assert desk.receiver.drop("r") == RELEASE and desk.held == 0


# --- Room -----------------------------------------------------------------------------------------


def test_hand_overs_wait_for_all_of_their_blocks_and_hold_none_meanwhile() -> None:
    desk = Desk(num_blocks=5)
    second = desk.expect("s")
    said = ready(request_id="s", lease_id="s/1")
    desk.announce(ready(0, 1))
    assert len(desk.job.block_ids) == 3, "at once, though one is announced"
    assert desk.announce(said) == [] and second.block_ids == []
    assert desk.receiver.retry(desk.now_s) == []
    desk.receiver.drop("r")
    assert desk.receiver.retry(desk.now_s) == [], "quarantine counts as held"
    desk.pulled([21])
    assert reads(desk.receiver.retry(desk.now_s)) == (THERE, 3)
    assert desk.receiver.retry(desk.now_s) == []


def test_the_digest_of_what_was_here_stays_our_own(desk: Desk) -> None:
    """Equal tokens, but perhaps not equal bytes: the source's digest is not that of our block."""
    (block,) = desk.cache(1)
    desk.pool.digests[block] = b"x" * 16
    desk.announce(ready())
    desk.pulled(THERE[1:])
    desk.receiver.released("r/1", True)
    known = [desk.pool.digests[block] for block in desk.job.block_ids]
    assert known == [b"x" * 16, *digests(THERE[1:2]), None], "none of the block that still fills"


def test_the_end_of_an_earlier_life_of_the_source_means_nothing(desk: Desk) -> None:
    assert desk.receiver.source_down("prefill-0", 6) == []
    assert desk.receiver.source_down("prefill-0", 7) == [desk.job]


def test_who_waits_for_blocks_does_not_hold_those_that_are_cached_here() -> None:
    desk = Desk(num_blocks=4)
    cached, others = desk.cache(2), desk.pool.allocate(2) or []
    assert desk.announce(ready()) == [] and desk.held == 2
    desk.pool.release(others)
    assert reads(desk.receiver.retry(desk.now_s)) == ([23], 1) and desk.job.block_ids[:2] == cached


def test_every_lease_is_renewed_with_one_message_to_each_source(desk: Desk) -> None:
    assert desk.receiver.renew() == [], "nothing is announced yet"
    desk.announce(ready(0, 1))
    desk.expect("s")
    desk.announce(ready(request_id="s", lease_id="s/1"))
    other = job_of(decode("t", range(NUM_TOKENS), source="prefill-1"))
    desk.receiver.expect(other, "prefill-1", 8, desk.now_s)
    desk.announce(ready(request_id="t", lease_id="t/1", epoch=8))
    assert not desk.receiver.live["t"].lease_id, "somebody else says so"
    desk.receiver.announced("prefill-1", ready(request_id="t", lease_id="t/1", epoch=8), desk.now_s)
    assert desk.receiver.renew() == [
        Send("prefill-0", Renew(lease_ids=["r/1", "s/1"])),
        Send("prefill-1", Renew(lease_ids=["t/1"])),
    ]
