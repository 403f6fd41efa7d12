"""What the index hears of a worker's prefix cache: whoever follows it knows the cache."""

import random

import pytest

from core.builders import EPOCH, node_info
from slipstream.core.blocks import BlockPool, Named
from slipstream.core.machine import BlockMove, PeerDown, Received, Send, SetTimer
from slipstream.core.membership import Membership
from slipstream.core.prefix import split_hashes
from slipstream.core.reporter import REPORT_DELAY_S, REPORT_TIMER, IndexReporter
from slipstream.messages import SCHEDULER, BlockEvents, Peers, Snapshot

INDEX = "kvindex-0"


class Desk:
    def __init__(self, *indexes: str, node_id: str = "decode-0"):
        self.membership = Membership(node_info(node_id))
        self.pool = BlockPool(4)
        self.reporter = IndexReporter(self.pool, self.membership)
        self.tell(*indexes)

    def tell(self, *indexes: str, stride: int = 1) -> None:
        peers = Peers(nodes=[node_info(name) for name in indexes], index_stride=stride)
        self.membership.handle(Received(SCHEDULER, peers), 0.0)

    def store(self, *names: bytes) -> None:
        """Blocks come into the cache; others may have to go. `a` is the first of its prompt."""
        for name in names:
            blocks = self.pool.allocate(1)
            assert blocks is not None
            self.pool.commit(blocks[0], name * 16, _named(name).position)
            self.pool.release(blocks)

    def moved(self, tier: int | None, *names: bytes) -> None:
        self.reporter.moved([BlockMove(*_named(name), tier) for name in names])

    def flush(self, now_s: float = 0.0) -> list[tuple[str, Snapshot | BlockEvents]]:
        """What is told at this time, or as long after it as changes may wait."""
        effects = self.reporter.flush(now_s) + self.reporter.flush(now_s + REPORT_DELAY_S)
        return [(send.to, send.message) for send in effects if isinstance(send, Send)]  # type: ignore[misc]


def _named(name: bytes) -> Named:
    return Named(name * 16, name[0] - ord("a"))


def _packed(*names: bytes) -> bytes:
    return b"".join(name * 16 for name in names)


def test_changes_of_several_steps_are_told_together() -> None:
    desk = Desk(INDEX)
    desk.flush()
    desk.store(b"a")
    assert desk.reporter.flush(1.0) == [SetTimer(REPORT_TIMER, 1.0 + REPORT_DELAY_S)]
    desk.store(b"b")
    assert desk.reporter.flush(1.01) == []
    (send,) = desk.reporter.flush(1.0 + REPORT_DELAY_S)
    assert isinstance(send, Send) and isinstance(send.message, BlockEvents)
    assert send.message.stored == _packed(b"a", b"b")
    assert desk.reporter.flush(2.0) == [], "and once"


def test_a_snapshot_once_then_changes_in_order() -> None:
    desk = Desk(INDEX)
    desk.store(b"a", b"b")
    assert desk.flush() == [(INDEX, Snapshot(epoch=EPOCH, seq=1, stored=b"a" * 16 + b"b" * 16))]
    assert desk.flush() == [], "nothing has changed"
    desk.store(b"c", b"d", b"e")
    events = BlockEvents(
        epoch=EPOCH, seq=2, stored=b"c" * 16 + b"d" * 16 + b"e" * 16, removed=b"a" * 16
    )
    assert desk.flush() == [(INDEX, events)]
    desk.store(b"f")
    events = BlockEvents(epoch=EPOCH, seq=3, stored=b"f" * 16, removed=b"b" * 16)
    assert desk.flush() == [(INDEX, events)]


def test_a_snapshot_on_request_and_only_for_the_one_who_is_told() -> None:
    desk = Desk(INDEX)
    desk.flush()
    desk.store(b"a")
    assert desk.reporter.snapshot("kvindex-9") == []
    assert desk.reporter.snapshot(INDEX) == [
        Send(INDEX, Snapshot(epoch=EPOCH, seq=2, stored=b"a" * 16))
    ]
    assert desk.flush() == [], "the snapshot has said it"


def test_without_an_index_nothing_is_kept_for_one() -> None:
    desk = Desk()
    desk.store(b"a")
    assert desk.flush() == []
    desk.store(b"b")
    desk.tell(INDEX)
    assert desk.flush() == [(INDEX, Snapshot(epoch=EPOCH, seq=1, stored=b"a" * 16 + b"b" * 16))]


def test_after_a_lost_session_it_begins_with_a_snapshot() -> None:
    desk = Desk(INDEX)
    desk.flush()
    desk.store(b"a")
    desk.flush()
    desk.reporter.peer_down("decode-1")
    assert desk.flush() == []
    desk.reporter.peer_down(INDEX)
    assert desk.flush() == [(INDEX, Snapshot(epoch=EPOCH, seq=3, stored=b"a" * 16))]


def test_workers_spread_over_the_indexes_that_live() -> None:
    names = ("kvindex-0", "kvindex-1", "kvindex-2")
    desks = [Desk(*names, node_id=f"decode-{number}") for number in range(30)]
    told = {desk.flush()[0][0] for desk in desks}
    assert told == set(names)
    for desk in desks:
        desk.membership.handle(PeerDown("kvindex-1"), 0.0)
        assert all(to != "kvindex-1" for to, _ in desk.flush())
        assert desk.reporter.target not in (None, "kvindex-1")


def test_with_a_stride_the_last_of_each_group_is_reported() -> None:
    desk = Desk(INDEX)
    desk.pool = desk.reporter.pool = BlockPool(12)
    desk.tell(INDEX, stride=3)
    desk.store(*(bytes([letter]) for letter in b"abcdefg"))
    assert desk.flush()[0][1].stored == _packed(b"c", b"f")
    desk.store(b"h")
    assert desk.flush() == [], "nothing that the index is to know"
    desk.moved(1, b"g", b"i", b"j")
    assert desk.flush() == [
        (INDEX, BlockEvents(epoch=EPOCH, seq=2, lower={1: _packed(b"i")})),
    ]
    desk.tell(INDEX, stride=4)
    snapshot = desk.flush()[0][1]
    assert snapshot.stored == _packed(b"d", b"h"), "the scheduler asks for others now"


def test_each_block_is_told_where_it_is_best() -> None:
    desk = Desk(INDEX)
    desk.flush()
    desk.store(b"a", b"b", b"c", b"d")
    desk.flush()
    desk.moved(1, b"a")
    assert desk.flush()[0][1].stored == _packed(b"a"), "it is still in the pool"
    desk.store(b"e", b"f")
    told = desk.flush()[0][1]
    assert isinstance(told, BlockEvents)
    assert (told.stored, told.removed, told.lower) == (
        *(_packed(b"e", b"f"), _packed(b"b"), {1: _packed(b"a")}),
    )
    desk.moved(2, b"a", b"b")
    assert desk.flush()[0][1].lower == {2: _packed(b"a", b"b")}
    snapshot = desk.reporter.snapshot(INDEX)[0]
    assert isinstance(snapshot, Send) and isinstance(snapshot.message, Snapshot)
    assert snapshot.message.stored == _packed(b"c", b"d", b"e", b"f")
    assert snapshot.message.lower == {2: _packed(b"a", b"b")}
    desk.moved(None, b"a", b"x")
    assert desk.flush()[0][1] == BlockEvents(epoch=EPOCH, seq=7, removed=_packed(b"a"))


def test_what_was_claimed_wrongly_is_put_right() -> None:
    desk = Desk(INDEX)
    desk.flush()
    desk.store(b"a")
    desk.flush()
    desk.moved(1, b"b")
    desk.flush()
    chain = [letter * 16 for letter in (b"a", b"b", b"c", b"d")]
    desk.reporter.claimed(chain, 2)
    assert (desk.reporter.claims, desk.reporter.claims_wrong) == (2, 0)
    assert desk.flush() == []
    desk.reporter.claimed(chain, 4)
    assert (desk.reporter.claims, desk.reporter.claims_wrong) == (6, 2)
    events = BlockEvents(epoch=EPOCH, seq=4, removed=_packed(b"c", b"d"))
    assert desk.flush() == [(INDEX, events)]
    desk.reporter.claimed(chain, 1000)
    assert desk.reporter.claims_wrong == 2 + 998, "a prompt has no such blocks"
    desk.flush()
    desk.reporter.claimed(chain[1:], 3, first=1)
    assert desk.reporter.claims_wrong == 2 + 998 + 2
    assert desk.flush()[0][1].removed == _packed(b"c", b"d"), "also when another worker asked"


@pytest.mark.parametrize("seed", range(30))
def test_who_follows_knows_where_everything_is(seed: int) -> None:
    draw = random.Random(seed)
    desk, known = Desk(INDEX), dict[bytes, int]()
    lower = dict[bytes, int]()
    stride = 1
    held: list[int] = []
    seq = 0
    for _ in range(300):
        name = bytes([ord("a") + draw.randrange(10)])
        if draw.random() < 0.7:
            desk.store(name)
        if draw.random() < 0.2:
            hits = desk.pool.match([name * 16])
            if len(held) < 3:
                desk.pool.take(hits)
                held += hits
        if held and draw.random() < 0.2:
            desk.pool.release([held.pop()])
        if draw.random() < 0.2:
            lower[name * 16] = draw.choice((1, 2))
            desk.moved(lower[name * 16], name)
        elif draw.random() < 0.2:
            lower.pop(name * 16, None)
            desk.moved(None, name)
        elif draw.random() < 0.1:
            count = draw.randrange(10)
            desk.reporter.claimed([bytes([ord("a") + n]) * 16 for n in range(count)], count)
        if draw.random() < 0.05:
            desk.reporter.peer_down(INDEX)
        if draw.random() < 0.03:
            stride = draw.choice((1, 2, 3))
            desk.tell(INDEX, stride=stride)
        for _, message in desk.flush() if draw.random() < 0.5 else ():
            if isinstance(message, Snapshot):
                known = {}
            else:
                assert message.seq == seq + 1, "a gap"
                for block_hash in split_hashes(message.removed):
                    known.pop(block_hash, None)
            for tier, packed in {**message.lower, 0: message.stored}.items():
                known |= dict.fromkeys(split_hashes(packed), tier)
            assert message.seq > seq
            seq = message.seq
            places = lower | dict.fromkeys(desk.pool.hashes(), 0)
            told = {h for h in places if (h[0] - ord("a") + 1) % stride == 0}
            assert known == {block_hash: places[block_hash] for block_hash in told}
