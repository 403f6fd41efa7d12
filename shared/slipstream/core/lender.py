"""The lending side: announce blocks of a hand-over as they fill, lend cached ones to whoever asks,
hold both under a lease, answer for it."""

from collections.abc import Sequence

from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job, blocks_for
from slipstream.core.lease import Lease, LeaseTable
from slipstream.core.machine import BatchDone, BlocksDigested, DigestBlocks, Effect, Row, Send
from slipstream.messages import Borrow, KvReady, Lent
from slipstream.types import (
    BLOCK_TOKENS,
    BlockHash,
    BlockId,
    Epoch,
    NodeId,
    RequestId,
    TokenLogprobs,
)


class Lender:
    """Leases hold references of their own, so a job may end before its blocks are read."""

    def __init__(self, pool: BlockPool, epoch: Epoch, lease_s: float):
        self.pool, self.epoch = pool, epoch
        self.table = LeaseTable(lease_s)
        self.blocks_lent = 0
        self._digesting: dict[str, tuple[BlockId, ...]] = {}

    def announce(
        self, job: Job, row: Row, done: BatchDone, first: TokenLogprobs | None, now_s: float
    ) -> KvReady:
        """What the reader learns after this step. With the last chunk the lease begins to run."""
        assert job.handover is not None
        last = row.sample
        end = blocks_for(job.num_computed)  # chunks end on block boundaries, all but the last
        blocks = job.block_ids[job.announced_blocks : end]
        digests = [self._digest(job, index, done) for index in range(job.announced_blocks, end)]
        lease_id = f"{job.request_id}/{job.attempt}"
        self.pool.take(blocks)
        self.table.grant(Lease(lease_id, job.request_id, job.attempt, job.handover), blocks)
        if last:
            self.table.start(lease_id, now_s)
        first_block, job.announced_blocks = job.announced_blocks, end
        return KvReady(
            request_id=job.request_id,
            attempt=job.attempt,
            lease_id=lease_id,
            epoch=self.epoch,
            first_block=first_block,
            block_ids=blocks,
            digests=b"".join(digests),
            num_tokens=job.num_computed,
            first_token=job.tokens[-1] if last else None,
            first_logprobs=first,
            prompt_logprobs=job.prompt_logprobs if last else [],
            cached_tokens=job.cached_tokens or 0,
        )

    def borrow(
        self, message: Borrow, hashes: Sequence[BlockHash], reader: NodeId, now_s: float
    ) -> list[Effect]:
        """Lend the leading ones of these that are in the pool."""
        blocks = self.pool.match(hashes) if message.epoch == self.epoch else []
        lease_id = message.lease_id
        strange = not lease_id.endswith(f"@{reader}") or lease_id in self._digesting
        if not blocks or strange or lease_id in self.table.live:
            return [Send(reader, _nothing(message, self.epoch))]
        self.blocks_lent += len(blocks)
        self.pool.take(blocks)
        self.pool.hit(blocks)
        lease = Lease(lease_id, message.request_id, message.attempt, reader, loan=True)
        self.table.grant(lease, blocks)
        self.table.start(lease_id, now_s)
        unknown = tuple(block for block in blocks if self.pool.digests[block] is None)
        if not unknown:
            return [self._lend(lease)]
        self._digesting[lease_id] = unknown
        return [DigestBlocks(lease_id, unknown)]

    def digested(self, done: BlocksDigested) -> list[Effect]:
        """The digests that a loan has waited for; its lease keeps the blocks as they were. Without
        them there is nothing to lend."""
        blocks = self._digesting.pop(done.op_id, ())
        lease = self.table.live.get(done.op_id)
        if lease is None:
            return []
        if done.digests is None:
            self._end(lease)
            return [Send(lease.reader, _nothing(lease, self.epoch))]
        for block, digest in zip(blocks, done.digests, strict=True):
            self.pool.digests[block] = digest
        return [self._lend(lease)]

    def _lend(self, lease: Lease) -> Effect:
        digests = [self.pool.digests[block] for block in lease.blocks]
        return Send(
            lease.reader,
            Lent(
                request_id=lease.request_id,
                attempt=lease.attempt,
                lease_id=lease.lease_id,
                epoch=self.epoch,
                block_ids=lease.blocks,
                digests=b"".join(digest for digest in digests if digest is not None),
            ),
        )

    def release(self, lease_id: str, reader: NodeId, now_s: float) -> bool:
        """End a lease at its reader's word; whether it was alive until now."""
        lease = self.table.live.get(lease_id)
        if lease is None or lease.reader != reader:
            return False
        self._end(lease)
        return lease.expires_s > now_s

    def drop(self, request_id: RequestId, attempt: int) -> None:
        """End the hand-overs of every attempt up to this one, at the scheduler's word."""
        for lease in list(self.table.live.values()):
            if lease.request_id == request_id and lease.attempt <= attempt and not lease.loan:
                self._end(lease)

    def reader_down(self, reader: NodeId) -> list[tuple[RequestId, int]]:
        """End the leases of a peer that fell silent: which attempts cannot go on without it."""
        lost = [lease for lease in self.table.live.values() if lease.reader == reader]
        for lease in lost:
            self._end(lease)
        return [(lease.request_id, lease.attempt) for lease in lost if not lease.loan]

    def lapse(self, now_s: float) -> list[str]:
        """End what nobody renewed; the ids."""
        over = self.table.lapse(now_s)
        for lease in over:
            self.pool.release(lease.blocks)
        return [lease.lease_id for lease in over]

    def _end(self, lease: Lease) -> None:
        self.table.end(lease.lease_id)
        self.pool.release(lease.blocks)

    def _digest(self, job: Job, index: int, done: BatchDone) -> bytes:
        """Of the job's block at `index`; of a full one it is known from then on."""
        block = job.block_ids[index]
        known = self.pool.digests[block]
        if known is not None:
            return known
        digest = done.digests[block]
        if (index + 1) * BLOCK_TOKENS <= job.num_computed:
            self.pool.digests[block] = digest
        return digest


def _nothing(asked: Borrow | Lease, epoch: Epoch) -> Lent:
    """Of what was asked for."""
    return Lent(
        request_id=asked.request_id,
        attempt=asked.attempt,
        lease_id=asked.lease_id,
        epoch=epoch,
    )
