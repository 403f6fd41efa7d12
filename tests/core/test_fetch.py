"""A prefix that lies in another worker is brought here, or computed; the answer is the same."""

import pytest

from core.builders import EPOCH, decode
from core.workers import PROMPT, Worker, answer
from slipstream.core import machine as m
from slipstream.core.load import load_of
from slipstream.core.reading import ANSWER_S
from slipstream.core.worker import TICK_S
from slipstream.core.worker_settings import WorkerSettings
from slipstream.messages import Borrow, Decode, Lent, Release, Released, Renew
from slipstream.types import NodeId

PARAMS: dict[str, object] = {"max_tokens": 6, "ignore_eos": True}


def asking(**changes: object) -> Decode:
    fields: dict[str, object] = {"holder": "decode-1", "holder_blocks": 2, **PARAMS, **changes}
    return decode("q", PROMPT, **fields)  # type: ignore[arg-type]


def carry(source: Worker, target: Worker) -> int:
    """What the source's last event said to the target; how many messages."""
    messages = source.to(target.node_id)
    for message in messages:
        target.hear(message, source.node_id)
    return len(messages)


class Two:
    """A reader, and a holder that has answered the same prompt before."""

    def __init__(self, **info: object):
        self.holder, self.reader = Worker("decode-1"), Worker("decode-0", **info)
        self.holder.hear(decode("p", PROMPT, **PARAMS))  # type: ignore[arg-type]
        self.holder.run()
        assert self.holder.held == 0 and len(self.holder.machine.pool.hashes()) >= 2

    def ask(self, **changes: object) -> None:
        self.reader.hear(asking(**changes))
        assert carry(self.reader, self.holder) == 1

    def lend(self) -> None:
        self.holder.digest()
        assert carry(self.holder, self.reader) == 1

    def read(self, wrong: bool = False) -> None:
        self.reader.read(self.holder, wrong)

    def confirm(self) -> None:
        assert carry(self.reader, self.holder) == 1
        assert carry(self.holder, self.reader) == 1

    def finish(self, computed: int) -> None:
        """The right answer, of whose prompt so many tokens were computed here; nothing is held."""
        (plan,) = self.reader.plans
        assert plan.rows[0].num_tokens == computed
        self.reader.run()
        assert self.reader.output() == answer(asking())[0]
        assert self.reader.held == 0 and self.holder.held == 0

    def failures(self, cause: str) -> float:
        return self.reader.load[f"fetch_{cause}_total"]


@pytest.fixture
def two() -> Two:
    return Two()


def test_a_prefix_comes_from_another_holder(two: Two) -> None:
    two.ask()
    assert two.holder.load["blocks_leased"] == two.holder.load["blocks_referenced"] == 2
    assert two.holder.load["leases"] == 1
    two.lend()
    assert not two.reader.plans, "it waits for what is on its way"
    two.read()
    assert not two.reader.plans, "read, but not confirmed"
    two.confirm()
    two.finish(computed=len(PROMPT) - 32)
    assert two.reader.load["blocks_fetched_total"] == 2
    assert two.reader.load["prefix_fetched_tokens_total"] == 32
    assert two.reader.load["prefix_hit_tokens_total"] == 32
    assert load_of(two.reader.machine).blocks_from == {two.holder.node_id: 2}
    assert two.reader.said[0].cached_tokens == 32
    load = two.holder.load
    assert (load["leases"], load["leases_granted_total"], load["blocks_referenced"]) == (0, 1, 0)


def test_what_is_here_is_not_asked_for(two: Two) -> None:
    two.reader.hear(decode("s", PROMPT[:17], **PARAMS))  # type: ignore[arg-type]
    two.reader.run()
    two.reader.said = []
    two.reader.hear(asking())
    ((_, borrow),) = two.reader.sent
    assert isinstance(borrow, Borrow) and borrow.first_block == 1
    assert len(borrow.block_hashes) == 16
    carry(two.reader, two.holder)
    two.lend()
    two.read()
    two.confirm()
    two.finish(computed=len(PROMPT) - 32)


@pytest.mark.parametrize("holder_blocks", [0, 1, 2, 9])
def test_no_more_than_the_index_says_is_asked_for(two: Two, holder_blocks: int) -> None:
    two.reader.hear(asking(holder_blocks=holder_blocks))
    asked = [len(said.block_hashes) // 16 for said in two.reader.to("decode-1")]
    assert asked == ([min(holder_blocks, 2)] if holder_blocks else [])


def test_the_digests_of_a_lent_block_are_computed_once(two: Two) -> None:
    two.ask()
    assert two.holder.digesting
    two.lend()
    two.read()
    two.confirm()
    two.reader.run()
    two.reader.hear(
        Borrow(
            request_id="t",
            attempt=1,
            lease_id="t/1@decode-1",
            epoch=EPOCH,
            first_block=0,
            block_hashes=b"".join(two.reader.machine.pool.hashes()[:2]),
        ),
        "decode-1",
    )
    assert not two.reader.digesting, "they came with the blocks"
    assert isinstance(two.reader.to("decode-1")[0], Lent)


def test_a_holder_that_cannot_digest_lends_nothing(two: Two) -> None:
    two.ask()
    two.holder.handle(m.BlocksDigested(two.holder.digesting.pop().op_id, None))
    assert two.holder.load["blocks_leased"] == 0
    assert carry(two.holder, two.reader) == 1
    assert two.failures("absent") == 1
    two.finish(computed=len(PROMPT))


@pytest.mark.parametrize(
    "cause", ["digest", "read", "expired", "peer", "silent", "absent", "no_room"]
)
def test_whatever_goes_wrong_the_prompt_is_computed(cause: str) -> None:
    two = Two(num_blocks=5) if cause == "no_room" else Two()
    if cause == "absent":
        two.holder.hear(decode("z", range(50, 64), max_tokens=1))
        two.holder.machine.pool.allocate(two.holder.machine.pool.num_available)
        two.holder = Worker("decode-1")
    if cause == "no_room":
        two.reader.hear(decode("o", range(1, 60), max_tokens=2, ignore_eos=True))
    two.ask()
    if cause == "peer":
        two.reader.handle(m.PeerUp("decode-1", EPOCH))
        two.reader.handle(m.PeerDown("decode-1"))
        two.holder.handle(m.PeerDown("decode-0"))
    elif cause == "silent":
        two.reader.pass_time(ANSWER_S + 1.0)
        two.holder.digest()
        carry(two.holder, two.reader)
        assert [type(message) for message in two.reader.to("decode-1")] == [Release]
        carry(two.reader, two.holder)
    elif cause == "absent":
        carry(two.holder, two.reader)
    else:
        two.lend()
        if cause == "read":
            two.reader.handle(m.PullDone(two.reader.pulls.pop().pull_id, error="timeout"))
            carry(two.reader, two.holder)
        elif cause == "no_room":
            carry(two.reader, two.holder)
        else:
            two.read(wrong=cause == "digest")
            if cause == "expired":
                two.holder.pass_time(20.0)
            carry(two.reader, two.holder)
            carry(two.holder, two.reader)
    assert two.failures(cause) == 1
    if cause == "no_room":
        two.reader.run()
        assert two.reader.held == 0 and two.holder.held == 0
    else:
        two.finish(computed=len(PROMPT))


@pytest.mark.parametrize("waits_for", ["the READ", "the word of the holder"])
def test_what_does_not_end_is_not_waited_for(two: Two, waits_for: str) -> None:
    """Neither the executor nor a holder that lives is relied on."""
    two.ask()
    two.lend()
    if waits_for != "the READ":
        two.read()
    said = two.reader.pass_time(WorkerSettings().pull_timeout_s)
    assert not two.reader.plans
    said += two.reader.pass_time(ANSWER_S + TICK_S)
    assert any(isinstance(message, Renew) for message in said)
    two.holder.pass_time(20.0)
    assert two.failures("silent") == 1
    if waits_for == "the READ":
        assert two.reader.load["blocks_quarantined"] == 2
        two.read()
    two.finish(computed=len(PROMPT))


def test_a_worker_whose_reads_never_end_begins_anew(two: Two) -> None:
    two.ask()
    two.lend()
    settings = WorkerSettings()
    two.reader.pass_time(settings.pull_timeout_s + ANSWER_S + TICK_S)
    assert two.reader.plans, "the job goes on, its blocks are in quarantine"
    two.reader.run()
    two.reader.pass_time(settings.stuck_s - 2 * TICK_S)
    assert not two.reader.exits
    two.reader.now_s += 3 * TICK_S
    two.reader.handle(m.TimerFired("tick"))
    assert two.reader.exits


def test_a_loan_is_renewed_while_it_is_read(two: Two) -> None:
    two.ask()
    two.lend()
    said = two.reader.pass_time(3.0)
    assert [message for message in said if isinstance(message, Renew)]
    for message in said:
        if isinstance(message, Renew):
            two.holder.hear(message, "decode-0")
    two.holder.pass_time(9.0)
    assert two.holder.load["blocks_leased"] == 2


@pytest.mark.parametrize("reading", [False, True])
def test_a_drop_in_between_frees_both_sides(two: Two, reading: bool) -> None:
    from slipstream.messages import Drop

    two.ask()
    if reading:
        two.lend()
    two.reader.hear(Drop(request_id="q", attempt=1))
    assert carry(two.reader, two.holder) == 1
    two.holder.digest()
    if reading:
        assert two.reader.load["blocks_quarantined"] == 2
        two.read()
    else:
        assert carry(two.holder, two.reader) == 0
    assert two.reader.held == 0 and two.holder.held == 0
    assert not two.reader.plans and not two.reader.machine.jobs


def test_a_loan_outlives_the_holders_own_request_and_ends_with_its_reader(two: Two) -> None:
    two.ask()
    two.holder.handle(m.PeerDown("decode-0"))
    assert two.holder.held == 0
    assert not [s for s in two.holder.to("scheduler")], "nobody's attempt has failed here"


@pytest.mark.parametrize("source", ["decode-1", "decode-2"])
def test_a_stranger_ends_no_loan(two: Two, source: NodeId) -> None:
    two.ask()
    two.holder.hear(Release(lease_id="q/1@decode-0", epoch=EPOCH), source)
    assert two.holder.to(source) == [Released(lease_id="q/1@decode-0", ok=False)]
    assert two.holder.load["blocks_leased"] == 2


def test_torn_hashes_are_answered_with_nothing(two: Two) -> None:
    two.holder.hear(
        Borrow(
            request_id="q", attempt=1, lease_id="l", epoch=EPOCH, first_block=0, block_hashes=b"x"
        ),
        "decode-0",
    )
    (lent,) = two.holder.to("decode-0")
    assert isinstance(lent, Lent) and not lent.block_ids


def test_what_the_index_claimed_and_is_not_here_counts_as_wrong(two: Two) -> None:
    two.holder = Worker("decode-1")
    two.ask()
    reporter = two.holder.machine.reporter
    assert (reporter.claims, reporter.claims_wrong) == (2, 2)
