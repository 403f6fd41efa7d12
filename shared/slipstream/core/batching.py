"""Which tokens run in the next step: continuous batching, chunked prefill, preemption.

There is no prefill phase and no decode phase (vLLM's idea): every job has `num_computed` tokens and
wants to reach `len(tokens)`. A job that is one behind decodes; one that is far behind prefills, in
chunks that end on block boundaries.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job, blocks_for
from slipstream.core.kv_events import KvEvents
from slipstream.core.machine import Admission, BatchPlan, Row
from slipstream.types import BLOCK_TOKENS, BlockId, RequestId

SCORED_TOKENS_MAX = 512
"""Of the prompts that one step scores, all together; a multiple of `BLOCK_TOKENS`. Their logits are
there at once, `[tokens, vocab]` in float32: 100 MB for 49,152 tokens, 300 MB for 150,000."""
assert SCORED_TOKENS_MAX % BLOCK_TOKENS == 0


@dataclass(slots=True)
class _Budget:
    """What a step has left for prompts."""

    tokens: int
    scored: int = SCORED_TOKENS_MAX

    def of(self, job: Job) -> int:
        return min(self.tokens, self.scored) if job.scores_prompt else self.tokens

    def take(self, job: Job, row: Row) -> None:
        """A stream's token is none of a prompt, nor are drafts: who streams holds no prompt up."""
        if row.num_tokens > 1:
            self.tokens -= row.num_tokens
            if job.scores_prompt:
                self.scored -= row.num_tokens


class Flight(NamedTuple):
    """A step that the device has been given and has not ended."""

    plan: BatchPlan
    jobs: list[Job]


class Batcher:
    """Owns the order of jobs. A step is planned while the one before it runs: what that one draws
    it takes as input unseen, and what turns out to be over was computed in vain."""

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        budget_tokens: int,
        kv_events: KvEvents | None = None,
        *,
        max_model_len: int = 1 << 30,
        steps_in_flight: int = 1,
        draft_tokens: int = 0,
    ):
        assert max_num_seqs >= 1 and budget_tokens >= BLOCK_TOKENS
        self.pool, self.kv_events = pool, kv_events
        self.max_num_seqs, self.budget_tokens = max_num_seqs, budget_tokens
        self.max_model_len, self.draft_tokens = max_model_len, draft_tokens
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.steps_in_flight = steps_in_flight
        self.in_flight: deque[Flight] = deque()
        self.steps = 0
        self.preemptions = 0
        self.hit_tokens = 0
        self.fetched_tokens = 0
        """Of the hits: what came from a tier or another worker for the job."""
        self.queried_tokens = 0
        self._forget: list[tuple[RequestId, int]] = []

    @property
    def busy(self) -> bool:
        return bool(self.in_flight)

    @property
    def dropped(self) -> set[Job]:
        """Those whose blocks wait for the end of a step."""
        return {job for flight in self.in_flight for job in flight.jobs if job.dropped}

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that nobody has computed yet."""
        return sum(len(job.tokens) - job.num_computed for job in (*self.waiting, *self.running))

    def add(self, job: Job) -> None:
        """A new job, to be prefilled here."""
        assert not job.dropped
        self.waiting.append(job)
        if self.kv_events is not None:
            self.kv_events.cached(job.tokens, job.hashes)  # what was fetched for it

    def add_computed(self, job: Job) -> None:
        """A job whose KV is here already, all but the last token's."""
        assert job.num_computed == len(job.tokens) - 1 and not job.dropped
        self.running.append(job)

    def remove(self, job: Job) -> None:
        """Forget a job. If a step with it is in flight, its blocks wait for the step's end."""
        job.dropped = True
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.running:
            self.running.remove(job)
        if not job.flying:
            self._free(job)

    def plan(self) -> BatchPlan | None:
        """The next step; None if nothing can run, or enough is in flight."""
        if len(self.in_flight) == self.steps_in_flight:
            return None
        rows: list[tuple[Job, Row]] = []
        budget = _Budget(self.budget_tokens)
        for job in list(self.running):
            if job not in self.running or self._ends(job):
                continue  # preempted a moment ago, or to leave with what is in flight
            if len(rows) == self.max_num_seqs:
                break  # hand-overs came in beside: they wait, with their blocks
            end = self._end(job, budget.of(job))
            if end is None:
                continue
            if not self._grow(job, end + job.drafting):
                if self.in_flight:
                    return None  # once that has landed, blocks may be taken from somebody
                continue
            self._take(rows, job, end, budget)
        for job in self._admit():
            end = self._end(job, budget.of(job))
            if end is not None:
                self._take(rows, job, end, budget)
            if budget.tokens < BLOCK_TOKENS:
                break
        return self._plan(rows) if rows else None

    def _take(self, rows: list[tuple[Job, Row]], job: Job, end: int, budget: _Budget) -> None:
        """The job's row."""
        row = self._row(job, end)
        rows.append((job, row))
        budget.take(job, row)

    def _plan(self, rows: list[tuple[Job, Row]]) -> BatchPlan:
        self.steps += 1
        admitted = tuple(self._admission(job) for job, _ in rows if not job.on_device)
        forget, self._forget = self._forget, []
        plan = BatchPlan(
            step=self.steps,
            rows=tuple(row for _, row in rows),
            admitted=admitted,
            dropped=tuple(forget),
            digest_blocks=tuple(b for job, row in rows for b in self._undigested(job, row)),
        )
        for job, row in rows:
            job.flying.append(row)
        self.in_flight.append(Flight(plan, [job for job, _ in rows]))
        return plan

    def land(self, step: int) -> list[tuple[Job, Row]]:
        """The step is over: its rows of jobs that are still wanted."""
        flight = self.in_flight.popleft()
        assert flight.plan.step == step
        for job in flight.jobs:
            del job.flying[0]
            if job.dropped and not job.flying:
                self._free(job)
        pairs = zip(flight.jobs, flight.plan.rows, strict=True)
        return [(job, row) for job, row in pairs if not job.dropped]

    def advance(self, job: Job, row: Row) -> None:
        """The row has landed, and what it drew is in the job's tokens."""
        first = job.num_computed // BLOCK_TOKENS
        job.num_computed = len(job.tokens) - 1 if row.sample else row.start + row.num_tokens
        self.commit(job, first)

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

    def _ends(self, job: Job) -> bool:
        """Whether it is sure to be over, here, with what is in flight."""
        drawing = job.drawing
        return drawing > 0 and (
            job.handover is not None
            or job.num_output + drawing >= job.sampling.max_tokens
            or len(job.tokens) + drawing >= self.max_model_len
        )

    def _end(self, job: Job, budget: int) -> int | None:
        """How far the job may get in this step; None if not at all."""
        start, length = job.num_computed + job.ahead, len(job.tokens) + job.drawing
        if length - start <= max(1, budget):
            return length
        end = (start + budget) // BLOCK_TOKENS * BLOCK_TOKENS
        return end if end > start else None

    def _grow(self, job: Job, end: int) -> bool:
        """Blocks for tokens up to `end`, if need be taken from the youngest job, which may be
        this; not while a step is in flight."""
        while (missing := blocks_for(end) - len(job.block_ids)) > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                job.block_ids += blocks
                return True
            if self.in_flight:
                return False
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
            hashes = [] if job.scores_prompt else job.full_hashes(len(job.tokens) - 1)
            hits = self.pool.match(hashes)
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
                self.fetched_tokens += min(job.fetched_blocks * BLOCK_TOKENS, job.cached_tokens)
                self.queried_tokens += job.num_prompt
            self.running.append(job)
            yield job

    def _preempt(self, job: Job) -> None:
        """Back to the head of the queue; what it computed stays as cache while it lasts."""
        assert job.handover is None and not job.flying
        self.running.remove(job)
        self.pool.release(job.block_ids)
        job.block_ids, job.num_computed = [], 0
        if job.scores_prompt:
            job.prompt_logprobs.clear()
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
        known = job.request_id, job.attempt, tuple(job.tokens), job.num_prompt, job.sampling
        return Admission(*known, job.adapter)

    def _row(self, job: Job, end: int) -> Row:
        start, drawing = job.num_computed + job.ahead, job.drawing
        drafts = self._drafts(job, start, end)
        scored = max(0, min(end, job.num_prompt - 1) - start) if job.scores_prompt else 0
        return Row(
            request_id=job.request_id,
            attempt=job.attempt,
            tokens=() if drawing else tuple(job.tokens[start:end]),
            start=start,
            block_ids=tuple(job.block_ids),
            sample=end == len(job.tokens) + drawing,
            position=job.num_output + drawing,
            after_previous=drawing > 0,
            drafts=drafts,
            prompt_logprobs=scored,
        )

    def _drafts(self, job: Job, start: int, end: int) -> int:
        """How many tokens may be proposed to a stream: what it still wants, and has blocks for."""
        if not self.draft_tokens or end - start > 1 or job.handover is not None:
            return 0
        drawn = 1 + job.drawing + job.drafting
        wanted = min(
            self.draft_tokens,
            job.sampling.max_tokens - job.num_output - drawn,
            self.max_model_len - len(job.tokens) - drawn,
        )
        last = end + job.drafting
        missing = blocks_for(last + max(0, wanted)) - len(job.block_ids)
        job.block_ids += (self.pool.allocate(missing) or []) if missing > 0 else []
        return max(0, min(wanted, len(job.block_ids) * BLOCK_TOKENS - last))

    def _undigested(self, job: Job, row: Row) -> list[BlockId]:
        """Blocks that will be announced after this step and whose digest is not known."""
        if job.handover is None:
            return []
        first, job.digested_blocks = job.digested_blocks, blocks_for(row.start + row.num_tokens)
        blocks = job.block_ids[first : job.digested_blocks]
        return [block for block in blocks if self.pool.digests[block] is None]
