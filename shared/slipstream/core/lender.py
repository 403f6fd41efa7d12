"""The prefill side of a hand-over: announce blocks as they fill, hold them under a lease,
answer."""

from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job, blocks_for
from slipstream.core.lease import LeaseTable
from slipstream.core.machine import BatchDone, Row
from slipstream.messages import KvReady
from slipstream.types import BLOCK_TOKENS, Epoch, NodeId, RequestId, TokenLogprobs


class Lender:
    """Leases hold references of their own, so a job may end before its blocks are read."""

    def __init__(self, pool: BlockPool, epoch: Epoch, lease_s: float):
        self.pool, self.epoch = pool, epoch
        self.table = LeaseTable(lease_s)

    def announce(
        self, job: Job, row: Row, done: BatchDone, first: TokenLogprobs | None, now_s: float
    ) -> KvReady:
        """What the reader learns after this step. With the last chunk the lease begins to run."""
        assert job.handover is not None
        last = row.sample
        end = blocks_for(job.num_computed)  # chunks end on block boundaries, all but the last
        blocks = job.block_ids[job.announced_blocks : end]
        digests = [self._digest(job, block, done) for block in blocks]
        lease_id = f"{job.request_id}/{job.attempt}"
        self.pool.take(blocks)
        self.table.grant(lease_id, job.handover, blocks)
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
            cached_tokens=job.cached_tokens or 0,
        )

    def release(self, lease_id: str, reader: NodeId, now_s: float) -> bool:
        """End a lease at its reader's word; whether it was alive until now."""
        lease = self.table.live.get(lease_id)
        if lease is None or lease.reader != reader:
            return False
        self.table.end(lease_id)
        self.pool.release(lease.blocks)
        return lease.expires_s > now_s

    def drop(self, request_id: RequestId, attempt: int) -> None:
        """End the leases of every attempt up to this one, at the scheduler's word."""
        for lease_id in list(self.table.live):
            owner, _, number = lease_id.rpartition("/")
            if owner == request_id and int(number) <= attempt:
                lease = self.table.end(lease_id)
                assert lease is not None
                self.pool.release(lease.blocks)

    def reader_down(self, reader: NodeId) -> list[tuple[RequestId, int]]:
        """End the leases of a peer that fell silent: which attempts they were for."""
        lost = [lease for lease in self.table.live.values() if lease.reader == reader]
        for lease in lost:
            self.table.end(lease.lease_id)
            self.pool.release(lease.blocks)
        keys = [lease.lease_id.rpartition("/") for lease in lost]
        return [(request_id, int(attempt)) for request_id, _, attempt in keys]

    def lapse(self, now_s: float) -> list[str]:
        """End what nobody renewed; the ids."""
        over = self.table.lapse(now_s)
        for lease in over:
            self.pool.release(lease.blocks)
        return [lease.lease_id for lease in over]

    def _digest(self, job: Job, block: int, done: BatchDone) -> bytes:
        known = self.pool.digests[block]
        if known is not None:
            return known
        digest = done.digests[block]
        full = (job.block_ids.index(block) + 1) * BLOCK_TOKENS <= job.num_computed
        if full:
            self.pool.digests[block] = digest
        return digest
