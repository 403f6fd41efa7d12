"""Which tokens run in the next step: continuous batching, chunked prefill, preemption.

There is no prefill phase and no decode phase (vLLM's idea): every job has `num_computed` tokens and
wants to reach `len(tokens)`. A job that is one behind decodes; one that is far behind prefills, in
chunks that end on block boundaries.
"""

from collections import deque
from collections.abc import Iterator

from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job, blocks_for
from slipstream.core.kv_events import KvEvents
from slipstream.core.machine import Admission, BatchPlan, Row
from slipstream.types import BLOCK_TOKENS, BlockId, RequestId


class Batcher:
    """Owns the order of jobs. At most one step is in flight."""

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        budget_tokens: int,
        kv_events: KvEvents | None = None,
    ):
        assert max_num_seqs >= 1 and budget_tokens >= BLOCK_TOKENS
        self.pool, self.kv_events = pool, kv_events
        self.max_num_seqs, self.budget_tokens = max_num_seqs, budget_tokens
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.in_flight: list[Job] = []
        self.steps = 0
        self.preemptions = 0
        self.hit_tokens = 0
        self.queried_tokens = 0
        self._forget: list[tuple[RequestId, int]] = []

    @property
    def busy(self) -> bool:
        return bool(self.in_flight)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that nobody has computed yet."""
        return sum(len(job.tokens) - job.num_computed for job in (*self.waiting, *self.running))

    def add(self, job: Job) -> None:
        """A new job, to be prefilled here."""
        self.waiting.append(job)
        if self.kv_events is not None:
            self.kv_events.cached(job.tokens, job.hashes)  # what was fetched for it

    def add_computed(self, job: Job) -> None:
        """A job whose KV is here already, all but the last token's."""
        assert job.num_computed == len(job.tokens) - 1
        self.running.append(job)

    def remove(self, job: Job) -> None:
        """Forget a job. If a step with it is in flight, its blocks wait for the step's end."""
        job.dropped = True
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.running:
            self.running.remove(job)
        if job not in self.in_flight:
            self._free(job)

    def plan(self) -> BatchPlan | None:
        """The next step, or None if nothing can run."""
        if self.in_flight:
            return None
        rows: list[tuple[Job, int]] = []
        budget = self.budget_tokens
        for job in list(self.running):
            if job not in self.running:
                continue  # preempted a moment ago
            if len(rows) == self.max_num_seqs:
                break  # hand-overs came in beside: they wait, with their blocks
            end = self._end(job, budget)
            if end is None or not self._grow(job, end):
                continue
            rows.append((job, end))
            budget -= end - job.num_computed
        for job in self._admit():
            end = self._end(job, budget)
            if end is not None:
                rows.append((job, end))
                budget -= end - job.num_computed
            if budget < BLOCK_TOKENS:
                break
        if not rows:
            return None
        self.steps += 1
        self.in_flight = [job for job, _ in rows]
        admitted = tuple(self._admission(job) for job, _ in rows if not job.on_device)
        forget, self._forget = self._forget, []
        return BatchPlan(
            step=self.steps,
            rows=tuple(self._row(job, end) for job, end in rows),
            admitted=admitted,
            dropped=tuple(forget),
            digest_blocks=tuple(b for job, end in rows for b in self._undigested(job, end)),
        )

    def land(self, plan: BatchPlan) -> list[tuple[Job, Row]]:
        """The step is over: its jobs that are still wanted, with KV and prefix cache up to date."""
        jobs, self.in_flight = self.in_flight, []
        landed = []
        for job, row in zip(jobs, plan.rows, strict=True):
            if job.dropped:
                self._free(job)
                continue
            job.num_computed = row.start + row.num_tokens
            self.commit(job, row.start // BLOCK_TOKENS)
            landed.append((job, row))
        return landed

    def crash(self) -> list[Job]:
        """The step failed: its jobs that are still wanted. Their KV is not to be trusted."""
        jobs, self.in_flight = self.in_flight, []
        for job in jobs:
            if job.dropped:
                self._free(job)
        return [job for job in jobs if not job.dropped]

    def commit(self, job: Job, first: int = 0) -> None:
        """Let prefixes find the job's full, computed blocks from the `first` on."""
        end = job.num_computed // BLOCK_TOKENS
        if first >= end:
            return  # most steps fill no block
        hashes = job.full_hashes(job.num_computed)
        for index in range(first, end):
            self.pool.commit(job.block_ids[index], hashes[index], index)
        if self.kv_events is not None:
            self.kv_events.cached(job.tokens, hashes)

    def _end(self, job: Job, budget: int) -> int | None:
        """How far the job may get in this step; None if not at all."""
        behind = len(job.tokens) - job.num_computed
        if behind <= max(1, budget):
            return len(job.tokens)
        end = (job.num_computed + budget) // BLOCK_TOKENS * BLOCK_TOKENS
        return end if end > job.num_computed else None

    def _grow(self, job: Job, end: int) -> bool:
        """Blocks for tokens up to `end`, if need be taken from the youngest job, which may be
        this."""
        while (missing := blocks_for(end) - len(job.block_ids)) > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                job.block_ids += blocks
                return True
            victim = next((j for j in reversed(self.running) if j.handover is None), job)
            self._preempt(victim)
            if victim is job:
                return False
        return True

    def _admit(self) -> Iterator[Job]:
        """Waiting jobs in order, as long as the blocks for all of their tokens are there."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            job = self.waiting[0]
            # The last token is computed in any case: its logits are what is wanted.
            hits = self.pool.match(job.full_hashes(len(job.tokens) - 1))
            self.pool.take(hits)
            blocks = self.pool.allocate(blocks_for(len(job.tokens)) - len(hits))
            if blocks is None:
                self.pool.release(hits)
                return
            self.waiting.popleft()
            self.pool.hit(hits)
            job.block_ids = hits + blocks
            job.num_computed = len(hits) * BLOCK_TOKENS
            if job.cached_tokens is None:
                job.cached_tokens = min(job.num_computed, job.num_prompt)
                self.hit_tokens += job.cached_tokens
                self.queried_tokens += job.num_prompt
            self.running.append(job)
            yield job

    def _preempt(self, job: Job) -> None:
        """Back to the head of the queue; what it computed stays as cache while it lasts."""
        assert job.handover is None and job not in self.in_flight
        self.running.remove(job)
        self.pool.release(job.block_ids)
        job.block_ids, job.num_computed = [], 0
        job.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(job)

    def _free(self, job: Job) -> None:
        self.pool.release(job.block_ids)
        job.block_ids = []
        if job.on_device:
            self._forget.append(job.key)
            job.on_device = False

    def _admission(self, job: Job) -> Admission:
        job.on_device = True
        return Admission(
            job.request_id, job.attempt, tuple(job.tokens), job.num_prompt, job.sampling
        )

    def _row(self, job: Job, end: int) -> Row:
        return Row(
            request_id=job.request_id,
            attempt=job.attempt,
            tokens=tuple(job.tokens[job.num_computed : end]),
            start=job.num_computed,
            block_ids=tuple(job.block_ids),
            sample=end == len(job.tokens),
            position=job.num_output,
        )

    def _undigested(self, job: Job, end: int) -> list[BlockId]:
        """Blocks that will be announced after this step and whose digest is not known."""
        if job.handover is None:
            return []
        blocks = job.block_ids[job.announced_blocks : blocks_for(end)]
        return [block for block in blocks if self.pool.digests[block] is None]
