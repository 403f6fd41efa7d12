"""A prefix that lies in a tier below or at another worker, brought here before the rest is
computed.

    in the pool -> from the tiers -> asked -> lent -> pulled -> releasing -> in the pool
        any failure, or no answer in time -> computed here like the rest

What comes is put into the prefix cache and let go of: the batcher finds it there when the job's
turn comes. So a fetch holds blocks for a bounded time, and nobody waits for another's.
"""

from collections import Counter
from dataclasses import dataclass, field

from slipstream.core.job import Job
from slipstream.core.machine import Effect, LoadBlocks, PullDone, Send
from slipstream.core.reading import ANSWER_S, LeasedRead, Reads
from slipstream.core.tiers import Tiers
from slipstream.messages import Borrow, Decode, Lent, Prefill, Release, Renew
from slipstream.types import BlockHash, BlockId, Epoch, NodeId, RequestId

LOAD_SHARE = 2
"""At most one in so many blocks of the pool is loaded into at a time: should the disk hang, steps
go on with the others."""


@dataclass(slots=True, eq=False, kw_only=True)
class Fetch(LeasedRead):
    """`source` is the holder; without a `lease_id` it has not been asked yet."""

    job: Job
    hashes: list[BlockHash]
    """Of all blocks that are of use."""
    holder_blocks: int
    kept: list[BlockId] = field(default_factory=list)
    """The leading blocks that are here; they have to stay."""


class Fetcher:
    """All fetches of one worker. `ready` fills up for the machine to collect."""

    def __init__(self, reads: Reads, node_id: NodeId, tiers: Tiers):
        self.reads, self.pool, self.node_id, self.tiers = reads, reads.pool, node_id, tiers
        self.live: dict[RequestId, Fetch] = {}
        self.ready: list[Job] = []
        self.failures: Counter[str] = Counter()
        self.blocks_fetched = 0

    def begin(self, job: Job, message: Prefill | Decode, now_s: float) -> list[Effect]:
        """Bring what is missing here; a job that lacks nothing is ready at once."""
        # The last token is computed in any case: its logits are what is wanted.
        hashes = job.full_hashes(len(job.tokens) - 1) if self.pool.caching else []
        kept = self.pool.match(hashes)
        self.pool.take(kept)
        strange = message.holder in (None, self.node_id)
        fetch = Fetch(
            name=f"{job.request_id}/{job.attempt}@{self.node_id}",
            source=message.holder or "",
            epoch=message.holder_epoch,
            job=job,
            hashes=hashes,
            holder_blocks=0 if strange else min(message.holder_blocks, len(hashes)),
            kept=kept,
        )
        self.live[job.request_id] = fetch
        return self._load(fetch, now_s) or self._ask(fetch, now_s)

    def lent(self, source: NodeId, message: Lent, now_s: float) -> list[Effect]:
        """The holder's answer. One that nobody waits for any more is given back."""
        fetch = self.live.get(message.request_id)
        waits = fetch is not None and fetch.lease_id == message.lease_id and not fetch.sources
        if fetch is None or not waits or source != fetch.source:
            return [Send(source, Release(lease_id=message.lease_id, epoch=message.epoch))]
        count = len(message.block_ids)
        if not count:
            return self._end(fetch, "absent")
        whole = fetch.announce(message.block_ids, message.digests)
        missing = fetch.holder_blocks - len(fetch.kept)
        if message.epoch != fetch.epoch or not whole or count > missing:
            return self._end(fetch, "malformed")
        blocks = self.pool.allocate(count)
        if blocks is None:
            return self._end(fetch, "no_room")
        fetch.local = blocks
        return [self.reads.pull(fetch, now_s)]

    def pulled(self, done: PullDone, now_s: float) -> list[Effect]:
        """A READ, or a load from the tiers, that somebody waits for is over."""
        fetch = next((f for f in self.live.values() if f.pulling == done.pull_id), None)
        if fetch is None:
            return []
        if not fetch.lease_id:
            fetch.pulling = ""
            self.reads.note(self.node_id, len(done.digests), done)
            self.tiers.blocks_loaded += len(done.digests)
            if len(done.digests) < len(fetch.local):
                self.failures["tier"] += 1
            self._keep(fetch, list(done.digests))
            return self._ask(fetch, now_s)
        self.reads.land(fetch, done)
        if fetch.failed:
            return self._end(fetch, fetch.failed)
        return self.reads.confirm(fetch, now_s)

    def released(self, lease_id: str, ok: bool) -> list[Effect]:
        """The holder's word on whether the lease lived during the READ."""
        fetch = next((f for f in self.live.values() if f.lease_id == lease_id), None)
        if fetch is None or not fetch.releasing:
            return []
        if not ok:
            return self._end(fetch, "expired")
        self.blocks_fetched += len(fetch.local)
        self._keep(fetch, fetch.digests)
        return self._end(fetch)

    def drop(self, request_id: RequestId) -> list[Effect]:
        """Give up for good: the job goes nowhere."""
        fetch = self.live.get(request_id)
        return [] if fetch is None else self._let_go(fetch)

    def source_down(self, source: NodeId, epoch: Epoch | None = None) -> None:
        """A holder fell silent; `epoch`: which life of it, if that is known."""
        for fetch in [f for f in self.live.values() if f.source == source and f.lease_id]:
            if epoch is None or fetch.epoch <= epoch:
                self._end(fetch, "peer")

    def expire(self, now_s: float) -> list[Effect]:
        """Wait no longer for what is overdue."""
        late = [fetch for fetch in self.live.values() if now_s >= fetch.due_s]
        return [effect for fetch in late for effect in self._end(fetch, "silent")]

    def renew(self) -> list[Effect]:
        return [
            Send(fetch.source, Renew(lease_ids=[fetch.lease_id]))
            for fetch in self.live.values()
            if fetch.sources
        ]

    def _load(self, fetch: Fetch, now_s: float) -> list[Effect]:
        """What the tiers have of it, if there is room. Nothing while a load that was given up goes
        on: the disk hangs, and would keep this one's blocks as well."""
        if self.reads.hung_loads:
            return []
        loading = sum(len(f.local) for f in self.live.values() if f.pulling and not f.lease_id)
        room = self.pool.num_blocks // LOAD_SHARE - loading
        hashes = self.tiers.run(fetch.hashes[len(fetch.kept) :])[: max(0, room)]
        blocks = self.pool.allocate(len(hashes)) if hashes else None
        if not blocks:
            return []
        fetch.local, fetch.pulling = blocks, f"{fetch.name}/tier"
        fetch.due_s = self.reads.due_s(now_s)
        return [LoadBlocks(fetch.pulling, tuple(hashes), tuple(blocks))]

    def _ask(self, fetch: Fetch, now_s: float) -> list[Effect]:
        """The holder for what is still missing."""
        hashes = fetch.hashes[len(fetch.kept) : fetch.holder_blocks]
        if not hashes:
            return self._end(fetch)
        fetch.lease_id = fetch.name
        fetch.due_s = now_s + ANSWER_S
        borrow = Borrow(
            request_id=fetch.job.request_id,
            attempt=fetch.job.attempt,
            lease_id=fetch.lease_id,
            epoch=fetch.epoch,
            first_block=len(fetch.kept),
            block_hashes=b"".join(hashes),
        )
        return [Send(fetch.source, borrow)]

    def _keep(self, fetch: Fetch, digests: list[bytes]) -> None:
        """These came whole, the rest of `local` did not: prefixes find them from now on."""
        start, count = len(fetch.kept), len(digests)
        for index, (block, digest) in enumerate(zip(fetch.local, digests, strict=False), start):
            self.pool.digests[block] = digest
            self.pool.commit(block, fetch.hashes[index], index)
        fetch.kept += fetch.local[:count]
        fetch.job.fetched_blocks += count
        self.pool.release(fetch.local[count:])
        fetch.local = []

    def _end(self, fetch: Fetch, cause: str = "") -> list[Effect]:
        """The job goes on, with what is in the cache by now."""
        self.ready.append(fetch.job)
        if cause:
            self.failures[cause] += 1
        return self._let_go(fetch)

    def _let_go(self, fetch: Fetch) -> list[Effect]:
        del self.live[fetch.job.request_id]
        self.reads.free(fetch)
        self.pool.release(fetch.kept)
        fetch.kept = []
        return [] if fetch.releasing else fetch.release()
