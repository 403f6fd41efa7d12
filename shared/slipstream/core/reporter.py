"""Tells the index what a worker's prefix cache holds: a snapshot once, then changes in order."""

import zlib

from slipstream.core.blocks import BlockPool
from slipstream.core.machine import Effect, Send
from slipstream.core.membership import Membership
from slipstream.messages import BlockEvents, Snapshot
from slipstream.types import NodeId, Role


class IndexReporter:
    """Each worker reports to one kvindex of those alive, found by its own name."""

    def __init__(self, pool: BlockPool, membership: Membership):
        self.pool, self.membership = pool, membership
        self.target: NodeId | None = None
        self.seq = 0

    def peer_down(self, peer: NodeId) -> None:
        """What was said last may be lost: whoever is told next gets a snapshot first."""
        if peer == self.target:
            self.target = None

    def snapshot(self, to: NodeId) -> list[Effect]:
        if to != self.target:
            return []
        self.pool.drain_events()
        self.seq += 1  # two snapshots of one number could hold different blocks
        node = self.membership.node
        stored = b"".join(self.pool.hashes())
        return [Send(to, Snapshot(epoch=node.epoch, seq=self.seq, stored=stored))]

    def flush(self, now_s: float) -> list[Effect]:
        """Changes since the last call, one message."""
        target = self._responsible(now_s)
        if target != self.target:
            self.target = target
            return [] if target is None else self.snapshot(target)
        stored, removed = self.pool.drain_events()
        if target is None or not (stored or removed):
            return []
        self.seq += 1
        events = BlockEvents(
            epoch=self.membership.node.epoch,
            seq=self.seq,
            stored=b"".join(stored),
            removed=b"".join(removed),
        )
        return [Send(target, events)]

    def _responsible(self, now_s: float) -> NodeId | None:
        alive = self.membership.alive(Role.KVINDEX, now_s)
        name = self.membership.node.node_id.encode()
        return alive[zlib.crc32(name) % len(alive)] if alive else None
