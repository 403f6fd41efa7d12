"""A prefix that another worker holds, brought here before the rest of the prompt is computed.

    asked -> lent -> pulled -> releasing -> in the prefix cache
        any failure, or no answer in time -> computed here like the rest

What comes is put into the prefix cache and let go of: the batcher finds it there when the job's
turn comes. So a fetch holds blocks for a bounded time, and nobody waits for another's.
"""

from collections import Counter
from dataclasses import dataclass, field

from slipstream.core.job import Job
from slipstream.core.machine import Effect, PullDone, Send
from slipstream.core.reading import LeasedRead, Reads
from slipstream.messages import Borrow, Decode, Lent, Prefill, Release, Renew
from slipstream.types import BlockHash, BlockId, Epoch, NodeId, RequestId

ANSWER_S = 1.0
"""Longest wait for a holder's `Lent`: to compute 16 tokens takes less."""


@dataclass(slots=True, eq=False, kw_only=True)
class Fetch(LeasedRead):
    job: Job
    due_s: float
    """Until when the holder has to answer."""
    hashes: list[BlockHash]
    """Of the blocks asked for."""
    kept: list[BlockId] = field(default_factory=list)
    """The blocks before them, which are here and have to stay."""


class Fetcher:
    """All fetches of one worker. `ready` fills up for the machine to collect."""

    def __init__(self, reads: Reads, node_id: NodeId):
        self.reads, self.pool, self.node_id = reads, reads.pool, node_id
        self.live: dict[RequestId, Fetch] = {}
        self.ready: list[Job] = []
        self.failures: Counter[str] = Counter()
        self.blocks_fetched = 0

    def begin(self, job: Job, message: Prefill | Decode, now_s: float) -> list[Effect]:
        """Ask the holder for what is missing here; a job that lacks nothing is ready at once."""
        # The last token is computed in any case: its logits are what is wanted.
        wanted = job.full_hashes(len(job.tokens) - 1)[: message.holder_blocks]
        kept = self.pool.match(wanted)
        hashes = wanted[len(kept) :]
        if message.holder in (None, self.node_id) or not hashes or not self.pool.caching:
            self.ready.append(job)
            return []
        assert message.holder is not None
        self.pool.take(kept)
        lease_id = f"{job.request_id}/{job.attempt}@{self.node_id}"
        self.live[job.request_id] = Fetch(
            name=lease_id,
            source=message.holder,
            epoch=message.holder_epoch,
            lease_id=lease_id,
            job=job,
            due_s=now_s + ANSWER_S,
            hashes=hashes,
            kept=kept,
        )
        borrow = Borrow(
            request_id=job.request_id,
            attempt=job.attempt,
            lease_id=lease_id,
            epoch=message.holder_epoch,
            first_block=len(kept),
            block_hashes=b"".join(hashes),
        )
        return [Send(message.holder, borrow)]

    def lent(self, source: NodeId, message: Lent) -> list[Effect]:
        """The holder's answer. One that nobody waits for any more is given back."""
        fetch = self.live.get(message.request_id)
        waits = fetch is not None and fetch.lease_id == message.lease_id and not fetch.sources
        if fetch is None or not waits or source != fetch.source:
            return [Send(source, Release(lease_id=message.lease_id, epoch=message.epoch))]
        count = len(message.block_ids)
        if not count:
            return self._end(fetch, "absent")
        whole = fetch.announce(message.block_ids, message.digests)
        if message.epoch != fetch.epoch or not whole or count > len(fetch.hashes):
            return self._end(fetch, "malformed")
        blocks = self.pool.allocate(count)
        if blocks is None:
            return self._end(fetch, "no_room")
        fetch.local = blocks
        return [self.reads.pull(fetch)]

    def pulled(self, done: PullDone) -> list[Effect]:
        """A READ that somebody waits for is over."""
        fetch = next((f for f in self.live.values() if f.pulling == done.pull_id), None)
        if fetch is None:
            return []
        self.reads.land(fetch, done)
        if fetch.failed:
            return self._end(fetch, fetch.failed)
        fetch.releasing = True
        return fetch.release()

    def released(self, lease_id: str, ok: bool) -> list[Effect]:
        """The holder's word on whether the lease lived during the READ."""
        fetch = next((f for f in self.live.values() if f.lease_id == lease_id), None)
        if fetch is None or not fetch.releasing:
            return []
        if not ok:
            return self._end(fetch, "expired")
        for index, block in enumerate(fetch.local):
            self.pool.digests[block] = fetch.digests[index]
            self.pool.commit(block, fetch.hashes[index], len(fetch.kept) + index)
        self.blocks_fetched += len(fetch.local)
        fetch.job.fetched_blocks = len(fetch.local)
        return self._end(fetch)

    def drop(self, request_id: RequestId) -> list[Effect]:
        """Give up for good: the job goes nowhere."""
        fetch = self.live.get(request_id)
        return [] if fetch is None else self._let_go(fetch)

    def source_down(self, source: NodeId, epoch: Epoch | None = None) -> None:
        """A holder fell silent; `epoch`: which life of it, if that is known."""
        for fetch in [f for f in self.live.values() if f.source == source]:
            if epoch is None or fetch.epoch <= epoch:
                self._end(fetch, "peer")

    def expire(self, now_s: float) -> list[Effect]:
        """Wait no longer for answers that are overdue."""
        late = [f for f in self.live.values() if not f.sources and now_s >= f.due_s]
        return [effect for fetch in late for effect in self._end(fetch, "silent")]

    def renew(self) -> list[Effect]:
        return [
            Send(fetch.source, Renew(lease_ids=[fetch.lease_id]))
            for fetch in self.live.values()
            if fetch.sources
        ]

    def _end(self, fetch: Fetch, cause: str = "") -> list[Effect]:
        """The job goes on, with what is in the cache by now."""
        self.ready.append(fetch.job)
        if cause:
            self.failures[cause] += 1
        return self._let_go(fetch)

    def _let_go(self, fetch: Fetch) -> list[Effect]:
        del self.live[fetch.job.request_id]
        self.reads.free(fetch)
        self.pool.release(fetch.kept)  # last: the tail of a prefix is evicted before its head
        fetch.kept = []
        return [] if fetch.releasing else fetch.release()
