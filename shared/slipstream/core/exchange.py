"""Blocks that come and go: hand-overs, prefixes fetched and lent, the tiers below the pool.

The worker asks two things of it: what became of a job that waits for blocks (`ready`, `recompute`,
`fetched`), and who holds which blocks (`references`).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from slipstream.core.blocks import BlockPool
from slipstream.core.fetcher import Fetcher
from slipstream.core.job import Job
from slipstream.core.lender import Lender
from slipstream.core.machine import (
    BlocksDigested,
    BlocksMoved,
    BlocksSaved,
    Effect,
    Event,
    PullDone,
    Send,
)
from slipstream.core.prefix import split_hashes
from slipstream.core.reading import Reads
from slipstream.core.receiver import Receiver
from slipstream.core.reporter import IndexReporter
from slipstream.core.tiers import Tiers
from slipstream.messages import (
    Borrow,
    Decode,
    KvReady,
    Lent,
    NodeInfo,
    Prefill,
    Release,
    Released,
    Renew,
)
from slipstream.types import BlockId, Epoch, NodeId, RequestId


class Exchange:
    def __init__(
        self,
        pool: BlockPool,
        node: NodeInfo,
        reporter: IndexReporter,
        lease_s: float,
        pull_timeout_s: float,
    ):
        self.epoch, self.reporter = node.epoch, reporter
        self.reads = Reads(pool, pull_timeout_s)
        self.lender = Lender(pool, node.epoch, lease_s)
        self.receiver = Receiver(self.reads)
        self.tiers = Tiers(pool, reporter)
        self.fetcher = Fetcher(self.reads, node.node_id, self.tiers)

    def expect(self, job: Job, message: Prefill | Decode, now_s: float) -> list[Effect]:
        """A new job: it takes over what another computes, or has what is cached brought here."""
        if isinstance(message, Decode) and message.prefill is not None:
            return self.receiver.expect(job, message.prefill, message.prefill_epoch, now_s)
        return self.fetcher.begin(job, message, now_s)

    def received(
        self, source: NodeId, message: object, job: Job | None, now_s: float
    ) -> list[Effect]:
        """What other workers say. `job`: the one that a `KvReady` is about, if it is here."""
        match message:
            case KvReady() if job is not None and job.attempt >= message.attempt:
                return self.receiver.announced(source, message, now_s)
            case KvReady():
                self.receiver.overtook(source, message, now_s)
            case Borrow():
                return self._borrowed(source, message, now_s)
            case Lent():
                return self.fetcher.lent(source, message, now_s)
            case Renew():
                for lease_id in message.lease_ids:
                    self.lender.table.renew(lease_id, now_s)
            case Release():
                mine = message.epoch == self.epoch
                ok = mine and self.lender.release(message.lease_id, source, now_s)
                return [Send(source, Released(lease_id=message.lease_id, ok=ok))]
            case Released():
                lease_id, ok = message.lease_id, message.ok
                return self.receiver.released(lease_id, ok) + self.fetcher.released(lease_id, ok)
        return []

    def _borrowed(self, reader: NodeId, message: Borrow, now_s: float) -> list[Effect]:
        """Somebody was told that this is here; who asks in torn words gets nothing."""
        try:
            hashes = split_hashes(message.block_hashes)
        except ValueError:
            hashes = []
        if message.epoch == self.epoch:
            self.reporter.claimed(hashes, len(hashes), message.first_block)
        return self.lender.borrow(message, hashes, reader, now_s)

    def happened(self, event: Event, now_s: float) -> list[Effect]:
        """What a transfer, a digest or a tier came to."""
        match event:
            case PullDone() if not self.reads.over(event):
                return self.receiver.pulled(event, now_s) + self.fetcher.pulled(event, now_s)
            case BlocksDigested():
                return self.lender.digested(event)
            case BlocksSaved(op_id):
                self.tiers.saved(op_id)
            case BlocksMoved(moved):
                self.tiers.moved(moved)
        return []

    def holds(self, request_id: RequestId) -> bool:
        """Whether the job waits for blocks, and not for its turn."""
        return request_id in self.receiver.live or request_id in self.fetcher.live

    def drop(self, request_id: RequestId) -> list[Effect]:
        return self.receiver.drop(request_id) + self.fetcher.drop(request_id)

    def peer_down(self, peer: NodeId, epoch: Epoch | None) -> list[Job]:
        """The jobs that cannot go on without this peer."""
        self.fetcher.source_down(peer, epoch)
        return self.receiver.source_down(peer, epoch)

    def renew(self) -> list[Effect]:
        return self.receiver.renew() + self.fetcher.renew()

    def tick(self, now_s: float) -> list[Effect]:
        self.lender.lapse(now_s)
        return self.receiver.expire(now_s) + self.fetcher.expire(now_s)

    def fetched(self) -> list[Job]:
        """Jobs that wait no longer for a prefix."""
        ready, self.fetcher.ready = self.fetcher.ready, []
        return [job for job in ready if not job.dropped]

    def settled(self) -> tuple[list[Job], list[Job]]:
        """Jobs that were taken over, and those that have to be computed here after all."""
        ready, self.receiver.ready = self.receiver.ready, []
        recompute, self.receiver.recompute = self.receiver.recompute, []
        return [j for j in ready if not j.dropped], [j for j in recompute if not j.dropped]

    @property
    def idle(self) -> bool:
        return not (self.lender.table.live or self.reads.given_up or self.tiers.saving)

    def references(self) -> Counter[BlockId]:
        """Blocks held for others, or on their way; those of hand-overs are their jobs'."""
        found: Iterable[list[BlockId]] = chain(
            (read.local for read in self.reads.given_up.values()),
            (fetch.local for fetch in self.fetcher.live.values()),
            (fetch.kept for fetch in self.fetcher.live.values()),
            (lease.blocks for lease in self.lender.table.live.values()),
            self.tiers.saving.values(),
        )
        return Counter(chain.from_iterable(found))
