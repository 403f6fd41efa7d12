"""The decode side of a hand-over: pull what is announced, confirm, and only then use it.

    expected -> announced* -> pulled* -> releasing -> ready
        any failure -> given up -> (no READ in flight, first token known) -> recompute

Local blocks are allocated all at once, so that two hand-overs never wait for each other's blocks.
Blocks that a READ may still write into stay referenced until the READ is over, whoever gave it up.
"""

from collections import Counter
from dataclasses import dataclass, field

from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job, blocks_for
from slipstream.core.machine import Effect, PullBlocks, PullDone, Send
from slipstream.core.prefix import HASH_BYTES
from slipstream.messages import KvReady, Release, Renew
from slipstream.types import BLOCK_TOKENS, BlockId, Epoch, NodeId, RequestId

DIGEST_BYTES = HASH_BYTES


@dataclass(slots=True, eq=False)
class Handover:
    job: Job
    source: NodeId
    epoch: Epoch
    lease_id: str = ""
    sources: list[BlockId] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    last: KvReady | None = None
    hits: int = 0
    """Blocks that were cached here and are not read; their bytes are our own."""
    pulled: int = 0
    pulling: str = ""
    """Id of the READ in flight."""
    pull_end: int = 0
    releasing: bool = False
    failed: str = ""
    pull_count: int = 0

    @property
    def allocated(self) -> bool:
        return bool(self.job.block_ids)


class Receiver:
    """All hand-overs into one worker. `ready` and `recompute` fill up for the machine to
    collect."""

    def __init__(self, pool: BlockPool, pull_timeout_s: float):
        self.pool, self.pull_timeout_s = pool, pull_timeout_s
        self.live: dict[RequestId, Handover] = {}
        self.zombies: dict[str, Handover] = {}
        """Given up while a READ ran, by the READ's id: their blocks are in quarantine."""
        self.ready: list[Job] = []
        self.recompute: list[Job] = []
        self.failures: Counter[str] = Counter()
        self.blocks_pulled = 0

    def expect(self, job: Job, source: NodeId, epoch: Epoch) -> None:
        self.live[job.request_id] = Handover(job, source, epoch)

    def announced(self, source: NodeId, message: KvReady) -> list[Effect]:
        """One more chunk is in the source's memory."""
        handover = self.live.get(message.request_id)
        if handover is None or handover.job.attempt != message.attempt:
            return []
        if source != handover.source:
            return []
        if message.epoch != handover.epoch or message.first_block != len(handover.sources):
            return []
        handover.lease_id = message.lease_id
        handover.sources += message.block_ids
        packed = message.digests
        handover.digests += [
            packed[i : i + DIGEST_BYTES] for i in range(0, len(packed), DIGEST_BYTES)
        ]
        if message.first_token is not None:
            handover.last = message
        if not self._coherent(handover):
            handover.failed = "malformed"
        return self._advance(handover)

    def pulled(self, done: PullDone) -> list[Effect]:
        """A READ is over."""
        zombie = self.zombies.pop(done.pull_id, None)
        if zombie is not None:
            self._free(zombie)
            return []
        handover = next((h for h in self.live.values() if h.pulling == done.pull_id), None)
        if handover is None:
            return []
        handover.pulling = ""
        start, end = handover.pulled, handover.pull_end
        if done.error is not None:
            handover.failed = handover.failed or "read"
        elif list(done.digests) != handover.digests[start:end]:
            handover.failed = handover.failed or "digest"
        else:
            handover.pulled = end
            self.blocks_pulled += end - start
        return self._advance(handover)

    def released(self, lease_id: str, ok: bool) -> list[Effect]:
        """The source's word on whether the lease lived during all READs."""
        handover = next((h for h in self.live.values() if h.lease_id == lease_id), None)
        if handover is None or not handover.releasing:
            return []
        if not ok:
            handover.failed = "expired"
            return self._advance(handover)
        job, last = handover.job, handover.last
        assert last is not None
        del self.live[job.request_id]
        job.num_computed = len(job.tokens)
        for index in range(handover.hits, job.num_computed // BLOCK_TOKENS):
            self.pool.digests[job.block_ids[index]] = handover.digests[index]
        self._take_first_token(handover)
        self.ready.append(job)
        return []

    def drop(self, request_id: RequestId) -> list[Effect]:
        """Give up for good, at the scheduler's word."""
        handover = self.live.pop(request_id, None)
        if handover is None:
            return []
        if handover.pulling:
            self.zombies[handover.pulling] = handover
        else:
            self._free(handover)
        return self._release(handover)

    def source_down(self, source: NodeId, epoch: Epoch | None = None) -> list[Job]:
        """The source fell silent; `epoch`: which life of it, if that is known. A later one is not
        meant. Returns the jobs that cannot go on without it."""
        lost = []
        for handover in [h for h in self.live.values() if h.source == source]:
            if epoch is not None and handover.epoch > epoch:
                continue
            if handover.last is None:
                lost.append(handover.job)
            else:
                handover.failed = handover.failed or "peer"
                self._advance(handover)
        return lost

    def retry(self) -> list[Effect]:
        """Blocks may have become free: try again to begin what waits for them."""
        effects: list[Effect] = []
        for handover in list(self.live.values()):
            if handover.sources and not handover.allocated and not handover.failed:
                effects += self._advance(handover)
        return effects

    def renew(self) -> list[Effect]:
        by_source: dict[NodeId, list[str]] = {}
        for handover in self.live.values():
            if handover.lease_id:
                by_source.setdefault(handover.source, []).append(handover.lease_id)
        return [Send(source, Renew(lease_ids=ids)) for source, ids in by_source.items()]

    def _coherent(self, handover: Handover) -> bool:
        """Whether what was announced so far can be this job's KV."""
        num_tokens, count = len(handover.job.tokens), len(handover.sources)
        if count != len(handover.digests) or count > blocks_for(num_tokens):
            return False
        last = handover.last
        return last is None or (last.num_tokens == num_tokens and count == blocks_for(num_tokens))

    def _advance(self, handover: Handover) -> list[Effect]:
        if handover.failed:
            return self._give_up(handover)
        if not handover.allocated and not self._allocate(handover):
            return []
        if handover.pulling or handover.releasing:
            return []
        if handover.pulled < len(handover.sources):
            return [self._pull(handover)]
        if handover.last is not None and handover.pulled >= len(handover.job.block_ids):
            handover.releasing = True
            return self._release(handover)
        return []

    def _allocate(self, handover: Handover) -> bool:
        """All local blocks at once, those that are cached here first. Cached ones are not read."""
        job = handover.job
        hits = self.pool.match(job.full_hashes(len(job.tokens)))
        self.pool.take(hits)
        blocks = self.pool.allocate(blocks_for(len(job.tokens)) - len(hits))
        if blocks is None:
            self.pool.release(hits)
            return False
        job.block_ids = hits + blocks
        handover.hits = handover.pulled = len(hits)
        return True

    def _pull(self, handover: Handover) -> Effect:
        job = handover.job
        handover.pull_count += 1
        handover.pulling = f"{job.request_id}/{job.attempt}/{handover.pull_count}"
        handover.pull_end = len(handover.sources)
        return PullBlocks(
            pull_id=handover.pulling,
            peer=handover.source,
            epoch=handover.epoch,
            source_blocks=tuple(handover.sources[handover.pulled : handover.pull_end]),
            local_blocks=tuple(job.block_ids[handover.pulled : handover.pull_end]),
            timeout_s=self.pull_timeout_s,
        )

    def _give_up(self, handover: Handover) -> list[Effect]:
        """Nothing that was read is used. Go on from the tokens alone, once they are known."""
        if handover.pulling or handover.last is None:
            return []
        job = handover.job
        self.failures[handover.failed] += 1
        del self.live[job.request_id]
        self._free(handover)
        self._take_first_token(handover)
        self.recompute.append(job)
        return [] if handover.releasing else self._release(handover)

    def _take_first_token(self, handover: Handover) -> None:
        job, last = handover.job, handover.last
        assert last is not None and last.first_token is not None
        job.append(last.first_token, last.first_logprobs)
        job.cached_tokens = last.cached_tokens

    def _release(self, handover: Handover) -> list[Effect]:
        if not handover.lease_id:
            return []
        return [Send(handover.source, Release(lease_id=handover.lease_id, epoch=handover.epoch))]

    def _free(self, handover: Handover) -> None:
        self.pool.release(handover.job.block_ids)
        handover.job.block_ids = []
