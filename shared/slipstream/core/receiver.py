"""The decode side of a hand-over: pull what is announced, confirm, and only then use it.

    expected -> announced* -> pulled* -> releasing -> ready
        any failure, or silence -> given up -> (first token known) -> recompute

Local blocks are allocated all at once, so that two hand-overs never wait for each other's blocks.
"""

from collections import Counter, deque
from dataclasses import dataclass

from slipstream.core.job import Job, blocks_for
from slipstream.core.machine import Effect, PullDone, Send
from slipstream.core.reading import LeasedRead, Reads
from slipstream.messages import KvReady, Renew
from slipstream.types import BLOCK_TOKENS, Epoch, NodeId, RequestId

EARLY_MAX = 1024
EARLY_KEEP_S = 10.0


@dataclass(slots=True, eq=False, kw_only=True)
class Handover(LeasedRead):
    job: Job
    last: KvReady | None = None
    hits: int = 0
    """Blocks that were cached here and are not read; their bytes are our own."""

    @property
    def allocated(self) -> bool:
        return bool(self.local)


class Receiver:
    """All hand-overs into one worker. `ready` and `recompute` fill up for the machine to
    collect."""

    def __init__(self, reads: Reads):
        self.reads, self.pool = reads, reads.pool
        self.live: dict[RequestId, Handover] = {}
        self.early: deque[tuple[float, NodeId, KvReady]] = deque(maxlen=EARLY_MAX)
        """Announcements that overtook their `Decode`, which comes from another sender; until
        when they are kept."""
        self.ready: list[Job] = []
        self.recompute: list[Job] = []
        self.failures: Counter[str] = Counter()
        self.blocks_pulled = 0

    def expect(self, job: Job, source: NodeId, epoch: Epoch, now_s: float) -> list[Effect]:
        name = f"{job.request_id}/{job.attempt}"
        self.live[job.request_id] = Handover(name=name, source=source, epoch=epoch, job=job)
        mine = [early for early in self.early if (early[2].request_id, early[2].attempt) == job.key]
        effects = []
        for early in mine:
            self.early.remove(early)
            _, sender, message = early
            effects += self.announced(sender, message, now_s)
        return effects

    def overtook(self, source: NodeId, message: KvReady, now_s: float) -> None:
        """Its `Decode` is not here yet."""
        self.early.append((now_s + EARLY_KEEP_S, source, message))

    def expire(self, now_s: float) -> list[Effect]:
        """Wait no longer for what is overdue."""
        while self.early and self.early[0][0] <= now_s:
            self.early.popleft()
        effects = []
        for handover in [h for h in self.live.values() if now_s >= h.due_s]:
            handover.failed = handover.failed or "silent"
            effects += self._advance(handover, now_s)
        return effects

    def announced(self, source: NodeId, message: KvReady, now_s: float) -> list[Effect]:
        """One more chunk is in the source's memory."""
        handover = self.live.get(message.request_id)
        if handover is None or handover.job.attempt != message.attempt:
            return []
        if source != handover.source:
            return []
        if message.epoch != handover.epoch or message.first_block != len(handover.sources):
            return []
        handover.lease_id = message.lease_id
        if message.first_token is not None:
            handover.last = message
        whole = handover.announce(message.block_ids, message.digests)
        if not (whole and self._coherent(handover)):
            handover.failed = "malformed"
        return self._advance(handover, now_s)

    def pulled(self, done: PullDone, now_s: float) -> list[Effect]:
        """A READ that somebody waits for is over."""
        handover = next((h for h in self.live.values() if h.pulling == done.pull_id), None)
        if handover is None:
            return []
        self.blocks_pulled += self.reads.land(handover, done)
        return self._advance(handover, now_s)

    def released(self, lease_id: str, ok: bool) -> list[Effect]:
        """The source's word on whether the lease lived during all READs."""
        handover = next((h for h in self.live.values() if h.lease_id == lease_id), None)
        if handover is None or not handover.releasing:
            return []
        if not ok:
            handover.failed = "expired"
            return self._give_up(handover)
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
        self.reads.free(handover)
        return handover.release()

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
                self._give_up(handover)
        return lost

    def retry(self, now_s: float) -> list[Effect]:
        """Blocks may have become free: try again to begin what waits for them."""
        effects: list[Effect] = []
        for handover in list(self.live.values()):
            if handover.sources and not handover.allocated and not handover.failed:
                effects += self._advance(handover, now_s)
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
        last = handover.last
        if last is None:
            return count <= blocks_for(num_tokens)
        return last.num_tokens == num_tokens and count == blocks_for(num_tokens)

    def _advance(self, handover: Handover, now_s: float) -> list[Effect]:
        if handover.failed:
            return self._give_up(handover)
        if not handover.allocated and not self._allocate(handover):
            return []
        if handover.pulling or handover.releasing:
            return []
        if handover.pulled < len(handover.sources):
            return [self.reads.pull(handover, now_s)]
        if handover.last is not None and handover.pulled >= len(handover.job.block_ids):
            return self.reads.confirm(handover, now_s)
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
        self.pool.hit(hits)
        job.block_ids = handover.local = hits + blocks
        handover.hits = handover.pulled = len(hits)
        return True

    def _give_up(self, handover: Handover) -> list[Effect]:
        """Nothing that was read is used. Go on from the tokens alone, once they are known."""
        if handover.last is None:
            return []
        job = handover.job
        self.failures[handover.failed] += 1
        del self.live[job.request_id]
        self.reads.free(handover)
        job.block_ids = []
        self._take_first_token(handover)
        self.recompute.append(job)
        return [] if handover.releasing else handover.release()

    def _take_first_token(self, handover: Handover) -> None:
        job, last = handover.job, handover.last
        assert last is not None and last.first_token is not None
        job.append(last.first_token, last.first_logprobs)
        job.prompt_logprobs = last.prompt_logprobs
        job.cached_tokens = last.cached_tokens
