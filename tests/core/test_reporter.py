"""What the index hears of a worker's prefix cache: whoever follows it knows the cache."""

import random

import pytest

from core.builders import EPOCH, node_info
from slipstream.core.blocks import BlockPool
from slipstream.core.machine import PeerDown, Received, Send
from slipstream.core.membership import Membership
from slipstream.core.prefix import split_hashes
from slipstream.core.reporter import IndexReporter
from slipstream.messages import SCHEDULER, BlockEvents, Peers, Snapshot

INDEX = "kvindex-0"


class Desk:
    def __init__(self, *indexes: str, node_id: str = "decode-0"):
        self.membership = Membership(node_info(node_id))
        self.pool = BlockPool(4)
        self.reporter = IndexReporter(self.pool, self.membership)
        self.tell(*indexes)

    def tell(self, *indexes: str) -> None:
        peers = Peers(nodes=[node_info(name) for name in indexes])
        self.membership.handle(Received(SCHEDULER, peers), 0.0)

    def store(self, *names: bytes) -> None:
        """Blocks come into the cache; others may have to go."""
        for name in names:
            blocks = self.pool.allocate(1)
            assert blocks is not None
            self.pool.commit(blocks[0], name * 16)
            self.pool.release(blocks)

    def flush(self, now_s: float = 0.0) -> list[tuple[str, Snapshot | BlockEvents]]:
        effects = self.reporter.flush(now_s)
        return [(send.to, send.message) for send in effects]  # type: ignore[union-attr, misc]


def test_a_snapshot_once_then_changes_in_order() -> None:
    desk = Desk(INDEX)
    desk.store(b"a", b"b")
    assert desk.flush() == [(INDEX, Snapshot(epoch=EPOCH, seq=0, stored=b"a" * 16 + b"b" * 16))]
    assert desk.flush() == [], "nothing has changed"
    desk.store(b"c", b"d", b"e")
    events = BlockEvents(
        epoch=EPOCH, seq=1, stored=b"c" * 16 + b"d" * 16 + b"e" * 16, removed=b"a" * 16
    )
    assert desk.flush() == [(INDEX, events)]
    desk.store(b"f")
    events = BlockEvents(epoch=EPOCH, seq=2, stored=b"f" * 16, removed=b"b" * 16)
    assert desk.flush() == [(INDEX, events)]


def test_a_snapshot_on_request_and_only_for_the_one_who_is_told() -> None:
    desk = Desk(INDEX)
    desk.flush()
    desk.store(b"a")
    assert desk.reporter.snapshot("kvindex-9") == []
    assert desk.reporter.snapshot(INDEX) == [
        Send(INDEX, Snapshot(epoch=EPOCH, seq=0, stored=b"a" * 16))
    ]
    assert desk.flush() == [], "the snapshot has said it"


def test_without_an_index_nothing_is_kept_for_one() -> None:
    desk = Desk()
    desk.store(b"a")
    assert desk.flush() == []
    desk.store(b"b")
    desk.tell(INDEX)
    assert desk.flush() == [(INDEX, Snapshot(epoch=EPOCH, seq=0, stored=b"a" * 16 + b"b" * 16))]


def test_after_a_lost_session_it_begins_with_a_snapshot() -> None:
    desk = Desk(INDEX)
    desk.flush()
    desk.store(b"a")
    desk.flush()
    desk.reporter.peer_down("decode-1")
    assert desk.flush() == []
    desk.reporter.peer_down(INDEX)
    assert desk.flush() == [(INDEX, Snapshot(epoch=EPOCH, seq=1, stored=b"a" * 16))]


def test_workers_spread_over_the_indexes_that_live() -> None:
    names = ("kvindex-0", "kvindex-1", "kvindex-2")
    desks = [Desk(*names, node_id=f"decode-{number}") for number in range(30)]
    told = {desk.flush()[0][0] for desk in desks}
    assert told == set(names)
    for desk in desks:
        desk.membership.handle(PeerDown("kvindex-1"), 0.0)
        assert all(to != "kvindex-1" for to, _ in desk.flush())
        assert desk.reporter.target not in (None, "kvindex-1")


@pytest.mark.parametrize("seed", range(30))
def test_who_follows_knows_the_cache(seed: int) -> None:
    draw = random.Random(seed)
    desk, known = Desk(INDEX), set[bytes]()
    held: list[int] = []
    seq = 0
    for _ in range(200):
        if draw.random() < 0.7:
            desk.store(bytes([draw.randrange(10)]))
        if draw.random() < 0.2:
            hits = desk.pool.match([bytes([draw.randrange(10)]) * 16])
            if len(held) < 3:
                desk.pool.take(hits)
                held += hits
        if held and draw.random() < 0.2:
            desk.pool.release([held.pop()])
        if draw.random() < 0.05:
            desk.reporter.peer_down(INDEX)
        for _, message in desk.flush() if draw.random() < 0.5 else ():
            if isinstance(message, Snapshot):
                known = set(split_hashes(message.stored))
            else:
                assert message.seq == seq + 1, "a gap"
                known |= set(split_hashes(message.stored))
                known -= set(split_hashes(message.removed))
            seq = message.seq
            assert known == set(desk.pool.hashes())
