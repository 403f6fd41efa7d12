"""Tells the index what a worker has of which prompt: a snapshot once, then changes in order."""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from slipstream.core.blocks import BlockPool, Named
from slipstream.core.kv_events import KvEvents
from slipstream.core.machine import BlockMove, Effect, PublishKvEvents, Send, SetTimer
from slipstream.core.membership import Membership
from slipstream.messages import BlockEvents, Snapshot
from slipstream.types import BlockHash, NodeId, Role

NOWHERE = -1
REPORT_TIMER = "report"
REPORT_DELAY_S = 0.02
"""A hint may be that old. One message for several steps spares the index most of its work, and the
token that a step has made does not compete with it for the cores."""


class IndexReporter:
    """Each worker reports to one kvindex of those alive, found by its own name.

    Of each prompt it reports the last of every `index_stride` blocks: it stands for those before
    it. The pool tells by itself what is in it; of the tiers below, `moved` does.
    """

    def __init__(self, pool: BlockPool, membership: Membership, kv_events: KvEvents | None = None):
        """`kv_events`: hears of the same changes, for routers that are not ours."""
        self.pool, self.membership, self.kv_events = pool, membership, kv_events
        self.target: NodeId | None = None
        self.seq = 0
        self.claims = self.claims_wrong = 0
        """Blocks that the index said are here, and those of them that were not."""
        self._stride = 1
        self._lower: dict[BlockHash, tuple[int, int]] = {}
        """Hash -> position and tier."""
        self._touched: dict[BlockHash, None] = {}
        self._due_s: float | None = None
        """When they are told."""

    def moved(self, moved: Iterable[BlockMove]) -> None:
        """What the tiers say about themselves."""
        for move in moved:
            known = self._lower.pop(move.block_hash, None)
            if move.tier is not None:
                self._lower[move.block_hash] = move.position, move.tier
            if known or move.tier is not None:
                self._touch(Named(move.block_hash, move.position))
            if self.kv_events is not None:
                self.kv_events.moved(move.block_hash, move.tier)

    def tier_of(self, block_hash: BlockHash) -> int | None:
        """Of the tiers below the pool the best that has it."""
        return self._lower.get(block_hash, (0, None))[1]

    def claimed(self, hashes: Sequence[BlockHash], count: int, first: int = 0) -> None:
        """The index was believed to say that the first `count` of these, which begin at the
        `first` block of a prompt, are here. It is told about those that are not."""
        there = 0
        while there < min(count, len(hashes)) and (
            hashes[there] in self.pool or hashes[there] in self._lower
        ):
            there += 1
        self.claims += count
        self.claims_wrong += count - there
        for index in range(there, min(count, len(hashes))):
            self._touch(Named(hashes[index], first + index))

    def peer_down(self, peer: NodeId) -> None:
        """What was said last may be lost: whoever is told next gets a snapshot first."""
        if peer == self.target:
            self.target = None

    def snapshot(self, to: NodeId) -> list[Effect]:
        if to != self.target:
            return []
        self._drain()
        self._touched.clear()
        lower = [Named(block_hash, at) for block_hash, (at, _) in self._lower.items()]
        everything = [block.block_hash for block in (*self.pool.named(), *lower) if self._of(block)]
        places = self._places(dict.fromkeys(everything))
        self.seq += 1  # two snapshots of one number could hold different blocks
        snapshot = Snapshot(
            epoch=self.membership.node.epoch,
            seq=self.seq,
            stored=places.pop(0, b""),
            lower=places,
        )
        return [Send(to, snapshot)]

    def flush(self, now_s: float) -> list[Effect]:
        """Changes so far, one message for each who hears of them. The index hears of them when the
        first is `REPORT_DELAY_S` old; a timer sees to the call."""
        self._drain()
        events = self.kv_events.flush() if self.kv_events is not None else ()
        published: list[Effect] = [PublishKvEvents(events)] if events else []
        return published + self._told(now_s)

    def _told(self, now_s: float) -> list[Effect]:
        target, stride = self._responsible(now_s), self.membership.index_stride
        if (target, stride) != (self.target, self._stride):
            self.target, self._stride = target, stride
            return [] if target is None else self.snapshot(target)
        if target is None:
            self._touched.clear()
        if target is None or not self._touched:
            return []
        if self._due_s is None:
            self._due_s = now_s + REPORT_DELAY_S
            return [SetTimer(REPORT_TIMER, self._due_s)]
        if now_s < self._due_s:
            return []
        self._due_s = None
        touched, self._touched = self._touched, {}
        places = self._places(touched)
        self.seq += 1
        events = BlockEvents(
            epoch=self.membership.node.epoch,
            seq=self.seq,
            stored=places.pop(0, b""),
            removed=places.pop(NOWHERE, b""),
            lower=places,
        )
        return [Send(target, events)]

    def _drain(self) -> None:
        changes = self.pool.drain_changes()
        if self.kv_events is not None:
            self.kv_events.changed(changes)
        for block in changes:
            self._touch(block)

    def _places(self, hashes: Iterable[BlockHash]) -> dict[int, bytes]:
        """Best tier -> hashes, packed."""
        places: defaultdict[int, list[BlockHash]] = defaultdict(list)
        for block_hash in hashes:
            in_pool = block_hash in self.pool
            tier = 0 if in_pool else self._lower.get(block_hash, (0, NOWHERE))[1]
            places[tier].append(block_hash)
        return {tier: b"".join(found) for tier, found in places.items()}

    def _touch(self, block: Named) -> None:
        if self._of(block):
            self._touched[block.block_hash] = None

    def _of(self, block: Named) -> bool:
        """Whether the index is to know of it."""
        return block.position % self._stride == self._stride - 1

    def _responsible(self, now_s: float) -> NodeId | None:
        alive = self.membership.alive(Role.KVINDEX, now_s)
        name = self.membership.node.node_id.encode()
        return alive[zlib.crc32(name) % len(alive)] if alive else None
