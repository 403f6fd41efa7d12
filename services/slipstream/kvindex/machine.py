"""The machine of kvindex: what workers say goes into the store, what schedulers ask comes out.

Nothing in here is the truth. What is lost, late or refused costs hits: a `Locate` that cannot be
answered well is answered with nothing, events that do not follow one another are mended by a
snapshot.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from slipstream.core.machine import (
    Drain,
    Effect,
    Event,
    Exit,
    PeerDown,
    Received,
    Send,
    SetTimer,
    Started,
    StoreDone,
    StoreFind,
    StoreForget,
    TimerFired,
)
from slipstream.core.membership import Membership
from slipstream.core.prefix import split_hashes
from slipstream.kvindex.feed import ASKS_MAX, QUEUE_MAX, Feed
from slipstream.messages import (
    BlockEvents,
    Locate,
    Located,
    NodeInfo,
    Peers,
    Snapshot,
    SnapshotRequest,
)
from slipstream.types import Epoch, NodeId, RequestId

TICK_TIMER = "tick"
TICK_S = 0.25
RENEW_S = 1.0
FEEDS_MAX = 4096
COUNTS = (
    *("events", "snapshots", "gaps", "malformed", "store_errors"),
    *("locates", "dropped", "lookups", "located_blocks"),
)


class KvIndexSettings(msgspec.Struct, frozen=True, kw_only=True):
    resync_s: float = 300.0
    """How often each worker is asked for all that it holds; 0: only when something is amiss."""
    store_timeout_s: float = 10.0
    """After this an operation of the store counts as failed, whatever becomes of it."""
    locate_timeout_s: float = 0.5
    """After this nobody waits for an answer any more."""
    max_locates: int = 256
    max_locate_hashes: int = 4096


class _Lookup(NamedTuple):
    source: NodeId
    request_id: RequestId
    attempt: int
    deadline_s: float


class KvIndexMachine:
    """One of several that share a store. Each worker talks to one of them."""

    def __init__(self, node: NodeInfo, settings: KvIndexSettings):
        self.settings = settings
        self.membership = Membership(node)
        self.store_up = False
        self.feeds: dict[NodeId, Feed] = {}
        self.lookups: dict[str, _Lookup] = {}
        self._ops: dict[str, Feed] = {}
        self._gone: dict[NodeId, Epoch] = {}
        """Whose feed was dropped when they were said to be gone. They may not know."""
        self._probe_id = ""
        self._probe_deadline_s = self._renew_at_s = 0.0
        self._op_number = 0
        self._draining = False
        self._counts = dict.fromkeys(COUNTS, 0)

    @property
    def ready(self) -> bool:
        """Whether the store has answered last."""
        return self.store_up

    @property
    def reason(self) -> str:
        return "" if self.ready else "Redis does not answer"

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        before = self._epochs() if _is_peers(event) else {}
        effects = self.membership.handle(event, now_s)
        match event:
            case Started():
                effects += self._tick(now_s)
            case TimerFired(key) if key == TICK_TIMER:
                effects += self._tick(now_s)
            case Received(_, Peers()):
                effects += self._forget(before) + self._welcome(now_s)
            case Received(source, BlockEvents() | Snapshot() as message):
                effects += self._told(source, message, now_s)
            case Received(source, Locate() as message):
                effects += self._locate(source, message, now_s)
            case PeerDown(peer):
                self._drop_feed(peer)
            case StoreDone():
                effects += self._store_done(event, now_s)
            case Drain():
                self._draining = True
                effects += self.membership.drain(now_s)
        if self._draining and not self._ops and not self.lookups:
            effects.append(Exit())
        return effects

    def statistics(self) -> dict[str, float]:
        totals = {f"index_{name}_total": float(count) for name, count in self._counts.items()}
        return {
            **totals,
            "store_up": float(self.store_up),
            "workers": float(len(self.feeds)),
            "workers_in_step": float(sum(feed.in_step for feed in self.feeds.values())),
            "lookups_in_flight": float(len(self.lookups)),
            "batches_waiting": float(sum(len(feed.queue) for feed in self.feeds.values())),
        }

    def check(self) -> None:
        assert len(self.lookups) <= self.settings.max_locates
        assert len(self.feeds) <= FEEDS_MAX
        for worker, feed in self.feeds.items():
            assert worker == feed.worker
            assert len(feed.queue) <= QUEUE_MAX + 1
            assert feed.op_id or not feed.queue, f"{worker} waits for nothing"
            assert not feed.op_id or self._ops[feed.op_id] is feed
        for op_id, feed in self._ops.items():
            assert feed.op_id == op_id and self.feeds[feed.worker] is feed

    # --- What workers say -------------------------------------------------------------------------

    def _told(self, worker: NodeId, message: BlockEvents | Snapshot, now_s: float) -> list[Effect]:
        self._counts["snapshots" if isinstance(message, Snapshot) else "events"] += 1
        feed = self._feed(worker, message.epoch)
        if feed is None or self._draining:
            return []
        try:
            if isinstance(message, BlockEvents):
                feed.events(message, now_s)
            else:
                resync_s = self.settings.resync_s
                feed.snapshot(message, now_s + resync_s if resync_s else math.inf)
        except ValueError:
            self._counts["malformed"] += 1
            feed.lost(now_s)
        return self._advance(feed, now_s)

    def _feed(self, worker: NodeId, epoch: Epoch) -> Feed | None:
        """That of the worker's epoch; None for an epoch that is over."""
        feed = self.feeds.get(worker)
        if feed is not None and feed.epoch >= epoch:
            return feed if feed.epoch == epoch else None
        if feed is None and len(self.feeds) >= FEEDS_MAX:
            return None
        self._drop_feed(worker)
        self.feeds[worker] = Feed(worker, epoch)
        return self.feeds[worker]

    def _advance(self, feed: Feed, now_s: float) -> list[Effect]:
        effects = feed.next(self._new_op, now_s + self.settings.store_timeout_s)
        if effects:
            self._ops[feed.op_id] = feed
        elif feed.ask_at_s <= now_s and not feed.op_id:
            effects += self._ask(feed, now_s)
        return effects

    def _ask(self, feed: Feed, now_s: float) -> list[Effect]:
        """For a snapshot, if it could be stored now."""
        if not self.store_up or self._draining:
            return []
        if feed.asks >= ASKS_MAX:
            self._drop_feed(feed.worker)
            return []
        feed.asked(now_s)
        return [Send(feed.worker, SnapshotRequest(epoch=feed.epoch))]

    def _drop_feed(self, worker: NodeId) -> None:
        feed = self.feeds.pop(worker, None)
        if feed is not None:
            self._ops.pop(feed.op_id, None)

    def _forget(self, before: Mapping[NodeId, Epoch]) -> list[Effect]:
        """Epochs that are over: their entries count no more, and may go."""
        now = self._epochs()
        over = {worker: epoch for worker, epoch in before.items() if now.get(worker) != epoch}
        for worker, epoch in over.items():
            if worker in self.feeds and self.feeds[worker].epoch <= epoch:
                self._drop_feed(worker)
                self._gone[worker] = epoch
        for worker in list(self._gone)[:-FEEDS_MAX]:
            del self._gone[worker]
        return [StoreForget(worker, epoch) for worker, epoch in over.items()]

    def _welcome(self, now_s: float) -> list[Effect]:
        """Who is there again, in the life that was said to be over: the scheduler had lost it, not
        we. What it says when something changes could be long in coming."""
        effects: list[Effect] = []
        for worker, epoch in self._epochs().items():
            if self._gone.pop(worker, None) == epoch and worker not in self.feeds:
                feed = self._feed(worker, epoch)
                effects += self._ask(feed, now_s) if feed is not None else []
        return effects

    # --- What schedulers ask ----------------------------------------------------------------------

    def _locate(self, source: NodeId, message: Locate, now_s: float) -> list[Effect]:
        self._counts["locates"] += 1
        try:
            hashes = split_hashes(message.block_hashes)[: self.settings.max_locate_hashes]
        except ValueError:
            self._counts["malformed"] += 1
            hashes = []
        workers = {
            node.node_id: node.epoch
            for node in self.membership.nodes.values()
            if node.worker is not None and node.worker.kv_layout_id == message.kv_layout_id
        }
        full = len(self.lookups) >= self.settings.max_locates
        self._counts["dropped"] += full
        if full or not (hashes and workers) or not self.store_up or self._draining:
            empty = Located(request_id=message.request_id, attempt=message.attempt, blocks={})
            return [Send(source, empty)]
        op_id = self._new_op()
        self.lookups[op_id] = _Lookup(
            *(source, message.request_id, message.attempt),
            deadline_s=now_s + self.settings.locate_timeout_s,
        )
        return [StoreFind(op_id, tuple(hashes), workers)]

    def _answer(self, lookup: _Lookup, done: StoreDone) -> list[Effect]:
        blocks = {worker: held.blocks for worker, held in done.holders.items()}
        lower = {worker: held.lower for worker, held in done.holders.items() if held.lower}
        self._counts["lookups"] += done.ok
        self._counts["located_blocks"] += max(blocks.values(), default=0)
        located = Located(
            request_id=lookup.request_id, attempt=lookup.attempt, blocks=blocks, lower=lower
        )
        return [Send(lookup.source, located)]

    # --- The store --------------------------------------------------------------------------------

    def _store_done(self, done: StoreDone, now_s: float) -> list[Effect]:
        if done.ok or done.op_id not in self._ops:  # else perhaps a part of it, or this key alone
            self.store_up = done.ok
        self._counts["store_errors"] += not done.ok
        if done.op_id == self._probe_id:
            self._probe_id = ""
        lookup = self.lookups.pop(done.op_id, None)
        if lookup is not None:
            return self._answer(lookup, done)
        feed = self._ops.pop(done.op_id, None)
        if feed is None:
            return []
        self._counts["gaps"] += done.gap
        feed.done(done.ok, done.gap, now_s)
        return self._advance(feed, now_s)

    def _tick(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = [SetTimer(TICK_TIMER, now_s + TICK_S)]
        for op_id, lookup in list(self.lookups.items()):
            if lookup.deadline_s <= now_s:
                del self.lookups[op_id]
                self._counts["dropped"] += 1
        renew = now_s >= self._renew_at_s
        if renew:
            self._renew_at_s = now_s + RENEW_S
            effects += self._probe(now_s)
        for feed in list(self.feeds.values()):
            if feed.op_id and feed.op_deadline_s <= now_s:
                effects += self._store_done(StoreDone(feed.op_id, ok=False), now_s)
            if renew:
                feed.renew()
            effects += self._advance(feed, now_s)
        return effects

    def _probe(self, now_s: float) -> list[Effect]:
        """A question without content: is the store there?"""
        if self._probe_id and now_s < self._probe_deadline_s:
            return []
        if self._probe_id:
            self.store_up = False
        self._probe_id = self._new_op()
        self._probe_deadline_s = now_s + self.settings.store_timeout_s
        return [StoreFind(self._probe_id)]

    def _new_op(self) -> str:
        """Unlike those of other processes that use the store, and of former ones."""
        self._op_number += 1
        node = self.membership.node
        return f"{node.node_id}/{node.epoch}/{self._op_number}"

    def _epochs(self) -> dict[NodeId, Epoch]:
        nodes = self.membership.nodes.values()
        return {node.node_id: node.epoch for node in nodes if node.worker is not None}


def _is_peers(event: Event) -> bool:
    return isinstance(event, Received) and isinstance(event.message, Peers)
