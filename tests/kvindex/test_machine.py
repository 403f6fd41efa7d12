"""kvindex comes back into step after anything, answers at once or not at all, and ends cleanly."""

import random
from collections import deque

import pytest

from slipstream.core.machine import (
    Drain,
    Effect,
    Event,
    Exit,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
    StoreAlive,
    StoreApply,
    StoreDone,
    StoreFind,
    StoreForget,
    StoreReplace,
    TimerFired,
)
from slipstream.kvindex import feed as feed_module
from slipstream.kvindex.machine import RENEW_S, TICK_S, KvIndexMachine, KvIndexSettings
from slipstream.kvindex.memory import MemoryStore
from slipstream.messages import (
    BlockEvents,
    Locate,
    Located,
    NodeInfo,
    Peers,
    Snapshot,
    SnapshotRequest,
    WorkerInfo,
)
from slipstream.types import Role

LAYOUT = "f00d/float32/l1"
HASHES = [bytes([number]) * 16 for number in range(20)]
STORE_EFFECTS = (StoreApply, StoreReplace, StoreFind, StoreAlive)


def worker_node(node_id: str = "w", epoch: int = 5, layout: str = LAYOUT) -> NodeInfo:
    info = WorkerInfo(
        model="toy",
        kv_layout_id=layout,
        num_blocks=1,
        block_bytes=1,
        max_model_len=64,
        vocab_size=10,
        max_num_seqs=4,
        prefill_budget_tokens=16,
        accept_decode=True,
    )
    return NodeInfo(node_id=node_id, role=Role.DECODE, epoch=epoch, address="", worker=info)


class Bench:
    """The machine with a clock, a twin of Redis, and operations that end when they are told to."""

    def __init__(self, **settings: float):
        node = NodeInfo(node_id="kvindex-0", role=Role.KVINDEX, epoch=1, address="")
        self.machine = KvIndexMachine(node, KvIndexSettings(**settings))  # type: ignore[arg-type]
        self.store = MemoryStore()
        self.now_s = 0.0
        self.tick_at_s = 0.0
        self.sent: deque[Send] = deque()
        self.pending: deque[Effect] = deque()
        self.told: list[Effect] = []
        self.exited = False
        self.up = True

    def give(self, event: Event) -> None:
        for effect in self.machine.handle(event, self.now_s):
            match effect:
                case Send():
                    self.sent.append(effect)
                case SetTimer("tick", at_s):
                    self.tick_at_s = at_s
                case Exit():
                    self.exited = True
                case StoreForget():
                    self.told.append(effect)
                    self.store.apply(effect)
                case _ if isinstance(effect, STORE_EFFECTS):
                    self.pending.append(effect)
        self.machine.check()

    def finish(self, ok: bool = True) -> None:
        """The oldest operation ends."""
        effect = self.pending.popleft()
        assert isinstance(effect, StoreApply | StoreReplace | StoreFind | StoreAlive)
        done = self.store.apply(effect) if ok else StoreDone(effect.op_id, ok=False)
        assert done is not None
        self.give(done)

    def settle(self) -> None:
        while self.pending:
            self.finish(self.up)

    def wait(self, seconds: float, settle: bool = True) -> None:
        until_s = self.now_s + seconds
        while self.tick_at_s <= until_s:
            self.now_s = self.tick_at_s
            self.give(TimerFired("tick"))
            if settle:
                self.settle()
        self.now_s = until_s

    def begin(self, *nodes: NodeInfo) -> None:
        self.give(Started())
        self.give(PeerUp("scheduler", 1))
        self.settle()
        self.introduce(*(nodes or (worker_node(),)))
        self.sent.clear()

    def introduce(self, *nodes: NodeInfo, gone: dict[str, int] | None = None) -> None:
        self.give(Received("scheduler", Peers(nodes=list(nodes), gone=gone or {})))

    def say(self, message: object, source: str = "w") -> None:
        self.give(Received(source, message))  # type: ignore[arg-type]

    def locate(self, *hashes: bytes, layout: str = LAYOUT) -> Located | None:
        """Asks, lets the store answer, and returns what was sent."""
        packed = b"".join(hashes or HASHES)
        message = Locate(request_id="r", attempt=2, kv_layout_id=layout, block_hashes=packed)
        self.say(message, "scheduler")
        self.settle()
        answers = [each.message for each in self.sent if isinstance(each.message, Located)]
        return answers[-1] if answers else None

    def requests(self) -> int:
        asked = [each for each in self.sent if isinstance(each.message, SnapshotRequest)]
        self.sent.clear()
        return len(asked)


def snapshot(
    seq: int, *stored: bytes, epoch: int = 5, lower: dict[int, bytes] | None = None
) -> Snapshot:
    return Snapshot(epoch=epoch, seq=seq, stored=b"".join(stored), lower=lower or {})


def events(
    seq: int,
    *stored: bytes,
    removed: tuple[bytes, ...] = (),
    epoch: int = 5,
    lower: dict[int, bytes] | None = None,
) -> BlockEvents:
    return BlockEvents(
        epoch=epoch,
        seq=seq,
        stored=b"".join(stored),
        removed=b"".join(removed),
        lower=lower or {},
    )


def located(lower: dict[str, int] | None = None, /, **blocks: int) -> Located:
    return Located(request_id="r", attempt=2, blocks=blocks, lower=lower or {})


def test_what_workers_store_is_located() -> None:
    bench = Bench()
    bench.begin(worker_node("v", 9), worker_node("w", 5))
    bench.say(snapshot(0, epoch=9), "v")
    bench.say(snapshot(3, *HASHES[:2]))
    bench.say(events(1, *HASHES[:6], epoch=9), "v")
    bench.say(events(4, *HASHES[2:5]))
    bench.say(events(5, removed=(HASHES[3],)))
    bench.settle()
    assert bench.locate() == located(v=6, w=3)
    assert bench.locate(*HASHES[4:]) == located(v=2, w=1)
    assert bench.locate(HASHES[9]) == located()
    assert bench.locate(layout="other") == located()
    assert bench.requests() == 0


def test_tiers_are_told_apart() -> None:
    bench = Bench()
    bench.begin(worker_node("v", 9), worker_node("w", 5))
    bench.say(snapshot(3, *HASHES[:4], lower={1: HASHES[4], 2: HASHES[5]}))
    bench.say(snapshot(0, *HASHES[:3], epoch=9), "v")
    bench.settle()
    assert bench.locate() == located({"w": 2}, v=3, w=6)
    bench.say(events(4, HASHES[5], lower={1: HASHES[0] + HASHES[6], 0: HASHES[9]}))
    bench.settle()
    assert bench.locate() == located({"w": 3}, v=3, w=7)


def test_a_restarted_worker_holds_nothing_until_it_says_so() -> None:
    bench = Bench()
    bench.begin()
    bench.say(snapshot(3, *HASHES))
    bench.settle()
    assert bench.locate() == located(w=20)
    bench.introduce(worker_node(epoch=6))
    assert StoreForget("w", 5) in bench.told
    assert bench.locate() == located()
    bench.say(events(4, HASHES[0]))  # what the old one said last
    bench.say(snapshot(0, HASHES[0], epoch=6))
    bench.say(snapshot(9, *HASHES))
    bench.settle()
    assert bench.locate() == located(w=1)


def test_a_worker_that_is_gone_is_forgotten_at_once() -> None:
    bench = Bench()
    bench.begin(worker_node("v"), worker_node("w"))
    for name in "vw":
        bench.say(snapshot(1, *HASHES), name)
    bench.say(events(2, *HASHES), "w")
    bench.introduce(worker_node("v"), gone={"w": 5})
    assert bench.told == [StoreForget("w", 5)]
    bench.settle()
    assert bench.locate() == located(v=20)


@pytest.mark.parametrize("epoch", [5, 6])
def test_a_worker_that_only_the_scheduler_had_lost_is_asked_what_it_has(epoch: int) -> None:
    """It may have nothing to report for a long time; a new life reports by itself."""
    bench = Bench()
    bench.begin()
    bench.say(snapshot(1, *HASHES))
    bench.settle()
    bench.introduce(gone={"w": 5})
    bench.settle()
    bench.sent.clear()
    bench.introduce(worker_node(epoch=epoch))
    assert bench.requests() == (epoch == 5)
    bench.say(snapshot(2, *HASHES, epoch=epoch))
    bench.settle()
    assert bench.locate() == located(w=20)


def test_batches_of_one_worker_go_one_after_another() -> None:
    bench = Bench()
    bench.begin(worker_node("v"), worker_node("w"))
    for name in "vw":
        bench.say(snapshot(0), name)
    for seq in range(1, 6):
        for name in "vw":
            bench.say(events(seq, HASHES[seq]), name)
    seen: list[tuple[str, int]] = []
    while bench.pending:
        waiting = [e for e in bench.pending if isinstance(e, StoreApply | StoreReplace)]
        assert len({effect.worker for effect in waiting}) == len(waiting)
        seen += [(effect.worker, effect.seq) for effect in waiting[:1]]
        bench.finish()
    assert [seq for worker, seq in seen if worker == "w"] == list(range(6))


def test_a_gap_asks_for_a_snapshot_once_and_events_wait_for_it() -> None:
    bench = Bench()
    bench.begin()
    bench.say(snapshot(3, HASHES[0]))
    bench.say(events(5, HASHES[1]))
    bench.settle()
    assert [each.message for each in bench.sent] == [SnapshotRequest(epoch=5)]
    bench.say(events(6, HASHES[2]))
    bench.settle()
    assert bench.requests() == 1
    bench.say(snapshot(6, *HASHES[:3]))
    bench.say(events(7, HASHES[3]))
    bench.settle()
    assert bench.locate() == located(w=4)
    assert bench.requests() == 0


def test_a_stranger_counts_once_it_is_known() -> None:
    bench = Bench()
    bench.begin(worker_node("v"))
    bench.say(snapshot(3, HASHES[0]))
    bench.say(events(4, HASHES[1]))
    bench.wait(2.0)
    assert bench.locate() == located()
    bench.introduce(worker_node("v"), worker_node("w"))
    assert bench.locate() == located(w=2)
    assert bench.requests() == 0


def test_what_the_store_has_lost_is_noticed_without_events() -> None:
    bench = Bench()
    bench.begin()
    bench.say(snapshot(3, *HASHES))
    bench.settle()
    for spoil in (bench.store.flush, lambda: bench.store.lapse("w")):
        spoil()
        bench.wait(RENEW_S + TICK_S)
        assert bench.requests() == 1
        bench.say(snapshot(4, *HASHES))
        bench.settle()
        assert bench.locate() == located(w=20)


def test_what_nobody_notices_is_mended_now_and_then() -> None:
    bench = Bench(resync_s=60.0)
    bench.begin()
    bench.say(snapshot(3, *HASHES))
    bench.settle()
    del bench.store.workers["w"].tiers[HASHES[0]]
    bench.wait(50.0)
    assert bench.requests() == 0
    assert bench.locate() == located()
    bench.wait(10.5)
    assert bench.requests() == 1
    assert bench.locate(*HASHES[1:]) == located(w=19), "what is there counts until then"
    bench.say(events(4, HASHES[0]))  # overtaken by nothing: the snapshot follows
    bench.say(snapshot(5, *HASHES))
    bench.settle()
    assert bench.locate() == located(w=20)
    bench.wait(50.0)
    assert bench.requests() == 0


def test_who_answers_no_question_tells_another_kvindex() -> None:
    bench = Bench()
    bench.begin()
    bench.say(snapshot(3, *HASHES))
    bench.settle()
    bench.store.apply(StoreReplace("", "w", 5, 4, ()))  # another kvindex was told
    bench.wait(300.0)
    assert bench.requests() == feed_module.ASKS_MAX
    assert not bench.machine.feeds
    bench.say(events(4, HASHES[0]))
    bench.wait(0.5)
    assert bench.requests() == 1, "it is back"


def test_snapshots_are_asked_for_less_and_less_often() -> None:
    bench = Bench()
    bench.begin()
    asked = []
    for seq in range(100):
        bench.say(events(5 + seq, HASHES[1]))
        bench.wait(1.0)
        asked.append(bench.requests())
    assert sum(asked[:10]) >= 4
    assert 1 <= sum(asked[40:]) <= 6


def test_a_lost_answer_of_the_store_is_not_waited_for_for_ever() -> None:
    bench = Bench()
    bench.begin()
    bench.say(snapshot(3, HASHES[0]))
    lost = bench.pending.popleft()
    bench.wait(KvIndexSettings().store_timeout_s + 2.0)
    assert bench.requests() >= 1
    bench.say(snapshot(4, HASHES[0]))
    bench.settle()
    assert bench.locate() == located(w=1)
    assert isinstance(lost, StoreReplace)
    bench.give(StoreDone(lost.op_id, ok=True, gap=True))
    assert bench.requests() == 0


def test_redis_down_then_up() -> None:
    bench = Bench()
    assert not bench.machine.ready
    bench.begin()
    assert bench.machine.ready
    bench.say(snapshot(3, HASHES[0]))
    bench.settle()
    bench.up = False
    bench.say(events(4, HASHES[1]))
    bench.settle()
    assert bench.requests() == 1
    bench.wait(RENEW_S)
    assert not bench.machine.ready
    bench.sent.clear()
    bench.wait(30.0)
    assert bench.requests() == 0  # it could not be stored
    assert bench.locate() == located()
    bench.store.flush()
    bench.up = True
    bench.wait(2.0)
    assert bench.machine.ready
    assert bench.requests() == 1
    bench.say(snapshot(4, *HASHES[:2]))
    bench.settle()
    assert bench.locate() == located(w=2)


def test_a_silent_redis_is_not_ready() -> None:
    bench = Bench()
    bench.begin()
    bench.wait(30.0, settle=False)
    assert not bench.machine.ready
    assert bench.locate() == located()


def test_questions_are_bounded_and_answered_at_once_beyond() -> None:
    bench = Bench(max_locates=3)
    bench.begin()
    message = Locate(request_id="r", attempt=2, kv_layout_id=LAYOUT, block_hashes=HASHES[0])
    for _ in range(5):
        bench.say(message, "scheduler")
    assert [each.message for each in bench.sent] == [located(), located()]
    assert len(bench.pending) == 3
    bench.wait(1.0, settle=False)
    assert len(bench.sent) == 2  # the scheduler has its own deadline
    bench.settle()
    assert len(bench.sent) == 2
    bench.say(message, "scheduler")
    assert len(bench.pending) == 1


def test_a_question_is_cut_to_size() -> None:
    bench = Bench(max_locate_hashes=4)
    bench.begin()
    bench.say(snapshot(1, *HASHES))
    bench.settle()
    assert bench.locate() == located(w=4)


@pytest.mark.parametrize(
    "message",
    [
        BlockEvents(epoch=5, seq=4, stored=b"short"),
        BlockEvents(epoch=5, seq=4, removed=b"x" * 17),
        Snapshot(epoch=5, seq=4, stored=b"x" * 15),
    ],
)
def test_torn_hashes_are_mended_by_a_snapshot(message: BlockEvents | Snapshot) -> None:
    bench = Bench()
    bench.begin()
    bench.say(snapshot(3, HASHES[0]))
    bench.settle()
    bench.say(message)
    assert bench.requests() == 1
    assert bench.machine.statistics()["index_malformed_total"] == 1


def test_a_torn_question_has_no_answer() -> None:
    bench = Bench()
    bench.begin()
    assert bench.locate(b"torn") == located()


def test_an_overflow_and_a_huge_batch_are_mended_by_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed_module, "QUEUE_MAX", 3)
    monkeypatch.setattr(feed_module, "BATCH_HASHES_MAX", 10)
    bench = Bench()
    bench.begin()
    bench.say(snapshot(0))
    bench.settle()
    for seq in range(1, 6):
        bench.say(events(seq, HASHES[seq]))
    assert len(bench.machine.feeds["w"].queue) == 0
    bench.settle()
    assert bench.requests() == 1
    bench.say(snapshot(5, *HASHES[:6]))
    bench.say(events(6, *HASHES[6:17]))
    bench.settle()
    assert bench.locate() == located(w=6)
    bench.sent.clear()
    bench.wait(2.0)
    assert bench.requests() == 1


def test_living_workers_are_renewed_others_not() -> None:
    bench = Bench()
    bench.begin(worker_node("v"), worker_node("w"))
    bench.say(snapshot(1), "w")
    bench.settle()
    renewed: list[Effect] = []

    def wait_and_see() -> None:
        renewed.clear()
        for _ in range(40):
            bench.wait(TICK_S, settle=False)
            renewed.extend(each for each in bench.pending if isinstance(each, StoreAlive))
            bench.settle()

    wait_and_see()
    assert 9 <= len(renewed) <= 11
    assert {(each.worker, each.epoch, each.seq) for each in renewed} == {("w", 5, 1)}  # type: ignore[union-attr]
    bench.give(PeerDown("w"))
    wait_and_see()
    assert not renewed


def test_drain_waits_for_what_is_under_way_and_takes_nothing_new() -> None:
    bench = Bench()
    bench.begin()
    bench.say(snapshot(1, HASHES[0]))
    bench.say(events(2, HASHES[1]))
    message = Locate(request_id="r", attempt=2, kv_layout_id=LAYOUT, block_hashes=HASHES[0])
    bench.say(message, "scheduler")
    bench.give(Drain())
    bench.sent.clear()
    bench.say(events(3, HASHES[2]))
    bench.say(message, "scheduler")
    assert [each.message for each in bench.sent] == [located()]
    while bench.pending:
        assert not bench.exited
        bench.finish()
    assert bench.exited
    assert bench.machine.membership.node.draining


def test_drain_at_rest_ends_at_once() -> None:
    bench = Bench()
    bench.begin()
    bench.give(Drain())
    assert bench.exited


class Worker:
    """A cache that changes, and its reports: a snapshot when asked or at a new session."""

    def __init__(self, name: str, epoch: int):
        self.name, self.epoch = name, epoch
        self.held: set[bytes] = set()
        self.lower: set[bytes] = set()
        self.seq = 0

    def change(self, drawn: random.Random) -> BlockEvents:
        stored = {h for h in drawn.sample(HASHES, 4) if h not in self.held}
        removed = {h for h in drawn.sample(HASHES, 4) if h in self.held | self.lower} - stored
        lowered = {h for h in drawn.sample(HASHES, 2) if h in self.held} - removed
        self.held = (self.held | stored) - removed - lowered
        self.lower = (self.lower | lowered) - removed - stored
        self.seq += 1
        lower = {1: b"".join(lowered)}
        return events(self.seq, *stored, removed=tuple(removed), epoch=self.epoch, lower=lower)

    def snapshot(self) -> Snapshot:
        self.seq += 1
        lower = {1: b"".join(self.lower)}
        return snapshot(self.seq, *self.held, epoch=self.epoch, lower=lower)


def step(bench: Bench, drawn: random.Random, workers: dict[str, Worker]) -> None:
    """One thing happens: mostly work, now and then a misfortune."""
    worker = workers[drawn.choice(sorted(workers))]
    kind = drawn.random()
    if kind < 0.5:
        bench.say(worker.change(drawn), worker.name)
    elif kind < 0.75:
        if bench.pending:
            bench.pending.rotate(-drawn.randrange(len(bench.pending)))
            bench.finish(ok=drawn.random() < 0.9)
    elif kind < 0.85:
        bench.wait(drawn.random(), settle=False)
    elif kind < 0.88:
        worker.change(drawn)  # lost with a session
        bench.give(PeerDown(worker.name))
        bench.give(PeerUp(worker.name, worker.epoch))
        bench.say(worker.snapshot(), worker.name)
    elif kind < 0.90:
        bench.store.flush()
    elif kind < 0.92:
        bench.store.lapse(worker.name)
    elif kind < 0.94 and bench.pending:
        bench.pending.popleft()  # an answer that never comes
    elif kind < 0.97:
        fresh = workers[worker.name] = Worker(worker.name, worker.epoch + 1)
        bench.give(PeerDown(worker.name))
        bench.introduce(*(worker_node(w.name, w.epoch) for w in workers.values()))
        bench.say(fresh.snapshot(), fresh.name)
    else:
        bench.introduce(gone={worker.name: worker.epoch})
        bench.introduce(*(worker_node(w.name, w.epoch) for w in workers.values()))
    answer(bench, workers)


def answer(bench: Bench, workers: dict[str, Worker]) -> None:
    while bench.sent:
        send = bench.sent.popleft()
        if isinstance(send.message, SnapshotRequest):
            worker = workers[send.to]
            if send.message.epoch == worker.epoch:
                bench.say(worker.snapshot(), worker.name)


@pytest.mark.parametrize("seed", range(60))
def test_after_any_misfortune_the_index_comes_to_be_right(seed: int) -> None:
    drawn = random.Random(seed)
    bench = Bench()
    workers = {name: Worker(name, 5) for name in "uvw"}
    bench.begin(*(worker_node(w.name, w.epoch) for w in workers.values()))
    for worker in workers.values():
        bench.say(worker.snapshot(), worker.name)
    for _ in range(300):
        step(bench, drawn, workers)
    # Calm weather: each worker speaks, the store answers, time goes by.
    for _ in range(30):
        for worker in workers.values():
            bench.say(worker.change(drawn), worker.name)
        bench.settle()
        bench.wait(5.0)
        answer(bench, workers)
        bench.settle()
    for worker in workers.values():
        for block_hash in HASHES:
            found = bench.locate(block_hash)
            assert found is not None
            assert (worker.name in found.blocks) == (block_hash in worker.held | worker.lower)
            assert found.lower.get(worker.name, 0) == (block_hash in worker.lower)
    assert bench.requests() == 0
