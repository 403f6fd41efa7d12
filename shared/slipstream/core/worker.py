"""The machine of prefill and decode workers: one program, two sets of weights.

A job comes in by `Prefill` (compute, hand over) or `Decode` (take over, or compute here), runs in
the batcher and leaves by `Finished`, by `AttemptFailed` or at the scheduler's `Drop`. Every event
ends in `_settle`: collect what became ready, plan the next step, say what there is to say.
"""

from collections import Counter
from itertools import chain
from typing import Any

import msgspec

from slipstream.core.batching import Batcher
from slipstream.core.blocks import BlockPool
from slipstream.core.exchange import Exchange
from slipstream.core.job import Job, unfit
from slipstream.core.kv_events import KvEvents
from slipstream.core.load import Samples, gauges_of, load_of, load_with_samples
from slipstream.core.machine import (
    AdapterRead,
    BatchDone,
    BatchFailed,
    BlocksDigested,
    BlocksMoved,
    BlocksSaved,
    Counted,
    Drain,
    Effect,
    Event,
    Exit,
    PeerDown,
    PeerUp,
    PullDone,
    Received,
    Row,
    RowOutput,
    RunBatch,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.core.membership import Membership
from slipstream.core.prefix import namespace
from slipstream.core.reporter import IndexReporter
from slipstream.core.step_watch import StepWatch
from slipstream.core.token_log import TokenLog
from slipstream.core.worker_adapters import WorkerAdapters
from slipstream.core.worker_settings import WorkerSettings
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    SCHEDULER,
    AttemptFailed,
    Borrow,
    Decode,
    Drop,
    Finished,
    KvReady,
    Lent,
    LiveRequest,
    NodeInfo,
    Peers,
    Prefill,
    Release,
    Released,
    Renew,
    Resend,
    ShiftRole,
    SnapshotRequest,
    StreamAck,
    UnwantAdapter,
    WantAdapter,
)
from slipstream.messages import Started as JobStarted
from slipstream.types import BLOCK_TOKENS, Epoch, NodeId, RequestId

TICK_S = 0.5
LOG_KEEP_S = 30.0
DEADLINE_SLACK_S = 5.0
"""A worker ends what is overdue by itself only if the scheduler did not."""
_NO_TOKEN = Problem(code=ErrorCode.INTERNAL, message="The model made no token.")


class WorkerMachine:
    """Owns one pool of KV blocks and every job in it."""

    def __init__(self, node: NodeInfo, settings: WorkerSettings):
        assert node.worker is not None
        self.info, self.settings = node.worker, settings
        self.membership = Membership(node, self._live)
        caching, hot_hits = settings.enable_prefix_caching, settings.offload_after_hits
        self.pool = BlockPool(self.info.num_blocks, caching, hot_hits)
        # Preempted and failed hand-overs are computed here, even on a worker that does not prefill.
        budget_tokens = max(self.info.prefill_budget_tokens, BLOCK_TOKENS)
        kv_events = KvEvents(self.pool) if settings.kv_events else None
        self.batcher = Batcher(
            *(self.pool, self.info.max_num_seqs, budget_tokens, kv_events),
            max_model_len=self.info.max_model_len,
            steps_in_flight=settings.steps_in_flight,
            draft_tokens=settings.draft_tokens,
        )
        self.reporter = IndexReporter(self.pool, self.membership, kv_events)
        self.exchange = Exchange(
            self.pool, node, self.reporter, settings.lease_s, settings.pull_timeout_s
        )
        self.log = TokenLog(LOG_KEEP_S)
        self.jobs: dict[RequestId, Job] = {}
        self.failures: Counter[str] = Counter()
        self.samples, self.steps = Samples(), StepWatch(settings.step_timeout_s)
        self._eos = frozenset(settings.eos_token_ids)
        self.counted: dict[str, float] = {}
        """By the executor, as of late."""
        self.adapters = WorkerAdapters(self.info.adapters)
        self._draining = False
        self._epochs: dict[NodeId, Epoch] = {}
        """Of the peers whose sessions are up."""

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        effects = self.membership.handle(event, now_s)
        effects += self._on(event, now_s)
        effects += self._settle(now_s)
        return self.log.flush() + effects  # first what a client waits for

    def statistics(self) -> dict[str, float]:
        return gauges_of(load_of(self))

    def check(self) -> None:
        """Every block reference has an owner, and every owner its references."""
        self.pool.check()
        for job in (*self.batcher.waiting, *self.batcher.running):
            assert self.jobs.get(job.request_id) is job, f"{job.request_id} runs for nobody"
        expected = self.exchange.references()
        for job in (*self.jobs.values(), *self.batcher.dropped):
            expected.update(job.block_ids)
        for block, count in enumerate(self.pool.references):
            assert count == expected[block], f"block {block}: {count} held, {expected[block]} known"
        self.adapters.check(self._adapters_used())
        load = load_of(self)
        assert load.blocks_free + load.blocks_used + load.blocks_leased == self.info.num_blocks

    # --- Events -----------------------------------------------------------------------------------

    def _on(self, event: Event, now_s: float) -> list[Effect]:
        match event:
            case Received(source, message):
                return self._received(source, message, now_s)
            case BatchDone():
                return self._batch_done(event, now_s)
            case BatchFailed(step, cause):
                return self._batch_failed(step, cause, now_s)
            case PullDone() | BlocksDigested() | BlocksSaved() | BlocksMoved():
                return self.exchange.happened(event, now_s)
            case AdapterRead():
                answer = self.adapters.read(event)
                return self._offer(now_s, adapters=self.adapters.offered) + answer
            case Counted(values):
                self.counted = values
            case TimerFired("tick"):
                return self._tick(now_s)
            case TimerFired("renew"):
                return [*self.exchange.renew(), SetTimer("renew", now_s + self.settings.renew_s)]
            case TimerFired("step"):
                return [Exit(self.steps.fault)]
            case Started():
                return [
                    SetTimer("tick", now_s + TICK_S),
                    SetTimer("renew", now_s + self.settings.renew_s),
                ]
            case PeerUp(peer, epoch):
                self._epochs[peer] = epoch
                for job in (*self.jobs.values(), *(e.job for e in self.log.ended.values())):
                    if job.tokenizer == peer:
                        self.log.repeat(job, 0)
            case PeerDown(peer):
                self.reporter.peer_down(peer)
                return self._half_lost(peer)
            case Drain():
                self._draining = True
                return self.membership.drain(now_s)
        return []

    def _received(self, source: NodeId, message: object, now_s: float) -> list[Effect]:
        match message:
            case Prefill() | Decode():
                return self._admit(message, now_s)
            case Drop():
                return self._drop(message.request_id, message.attempt)
            case ShiftRole(accept_decode=accept) if accept != self.info.accept_decode:
                shifted = not self.info.shifted
                return self._offer(now_s, accept_decode=accept, shifted=shifted)
            case WantAdapter():
                return self.adapters.want(message)
            case UnwantAdapter():
                self.adapters.unwant(message)
                return self._offer(now_s, adapters=self.adapters.offered)
            case StreamAck():
                self.log.acknowledge(message.request_id, message.attempt)
            case Resend():
                ended = self.log.ended.get(message.request_id)
                job = self.jobs.get(message.request_id) or (ended.job if ended else None)
                if job is not None and job.attempt == message.attempt:
                    self.log.repeat(job, message.position)
            case SnapshotRequest() if message.epoch == self.membership.node.epoch:
                return self.reporter.snapshot(source)
            case KvReady() | Borrow() | Lent() | Renew() | Release() | Released():
                named = message.request_id if isinstance(message, KvReady) else ""
                job = self.jobs.get(named)
                return self.exchange.received(source, message, job, now_s)
            case Peers():
                pass  # membership has read it
        return []

    def _admit(self, message: Prefill | Decode, now_s: float) -> list[Effect]:
        known = self.jobs.get(message.request_id)
        if known is not None and known.attempt >= message.attempt:
            return []
        effects = [] if known is None else self._drop(known.request_id, known.attempt)
        key = message.request_id, message.attempt
        if (problem := unfit(message, self.info)) is not None:
            return effects + self._failed(key, "unfit", problem=problem)
        if not self.adapters.has(message.adapter):
            return effects + self._failed(key, "no_adapter")
        space = namespace(self.info.kv_layout_id, message.salt, message.adapter)
        job = Job.of(message, space, self.membership.node.node_id, now_s)
        self.jobs[job.request_id] = job
        if message.claimed_blocks:
            self.reporter.claimed(job.full_hashes(len(job.tokens)), message.claimed_blocks)
        return effects + self.exchange.expect(job, message, now_s)

    def _adapters_used(self) -> set[str]:
        return {job.adapter for job in (*self.jobs.values(), *self.batcher.dropped)}

    def _offer(self, now_s: float, **changes: Any) -> list[Effect]:
        self.info = msgspec.structs.replace(self.info, **changes)
        return self.membership.offer(self.info, now_s)

    # --- The step ---------------------------------------------------------------------------------

    def _batch_done(self, done: BatchDone, now_s: float) -> list[Effect]:
        outputs = {(output.request_id, output.attempt): output for output in done.outputs}
        plan = self.batcher.in_flight[0].plan
        self.samples.step(plan, done)
        self.steps.took(plan, done.elapsed_s)
        landed = self.batcher.land(done.step)
        effects = [self.steps.timer(self.batcher.in_flight, now_s)]
        for job, row in landed:
            output = outputs.get(job.key)
            if not self._take(job, row, output):
                effects += self._fail(
                    job, "no_token", problem=(output and output.problem) or _NO_TOKEN
                )
                continue
            self.batcher.advance(job, row)
            if row.sample and row.position == job.num_accepted:
                effects.append(Send(SCHEDULER, job.first_token()))
            if job.handover is not None:
                effects += self._lend(job, row, done, now_s)
            elif row.sample:
                self.log.stage(job)
            if job.finish_reason is not None:
                effects += self._finish(job, now_s)
        return effects

    def _take(self, job: Job, row: Row, output: RowOutput | None) -> bool:
        """What the row made, up to the token that ends the stream; False if some is missing."""
        if not (row.sample or row.prompt_logprobs):
            return output is None or output.problem is None
        if output is None or len(output.prompt_logprobs) != row.prompt_logprobs:
            return False
        job.prompt_logprobs += output.prompt_logprobs
        if row.sample and not output.tokens:
            return False
        for index, token in enumerate(output.tokens):
            job.append(token, output.logprobs[index] if output.logprobs else None)
            if job.settle(self._eos, self.info.max_model_len):
                break
        return True

    def _lend(self, job: Job, row: Row, done: BatchDone, now_s: float) -> list[Effect]:
        """Announce what this chunk filled; after the last one the job's work here is over."""
        assert job.handover is not None
        if job.finish_reason is not None:
            self.exchange.lender.drop(job.request_id, job.attempt)  # nothing is left to decode
            self.log.stage(job)
            return []
        first = job.logprobs[-1] if row.sample and job.logprobs else None
        ready = self.exchange.lender.announce(job, row, done, first, now_s)
        if row.sample:
            self.log.stage(job)
            self._leave(job)
        return [Send(job.handover, ready)] if ready.block_ids or row.sample else []

    def _finish(self, job: Job, now_s: float) -> list[Effect]:
        self._leave(job)
        self.log.end(job, now_s)
        return [Send(SCHEDULER, Finished(request_id=job.request_id, attempt=job.attempt))]

    def _batch_failed(self, step: int, cause: str, now_s: float) -> list[Effect]:
        """Nothing of it may be used, nor what the step after it makes of that."""
        landed = self.batcher.land(step)
        beside = len(landed) - 1
        failed = [self._fail(job, f"step: {cause}", beside=beside) for job, _ in landed]
        watched = self.steps.timer(self.batcher.in_flight, now_s)
        return [watched, *chain.from_iterable(failed)]

    def _settle(self, now_s: float) -> list[Effect]:
        effects = self.exchange.receiver.retry(now_s)
        for job in self.exchange.fetched():
            self.batcher.add(job)
        ready, recompute = self.exchange.settled()
        for job in ready:
            self.batcher.commit(job)
        for job in (*ready, *recompute):
            started = JobStarted(request_id=job.request_id, attempt=job.attempt)
            effects.append(Send(SCHEDULER, started))
            if job.settle(self._eos, self.info.max_model_len):
                self.log.stage(job)
                effects += self._finish(job, now_s)
            elif job.num_computed:
                self.batcher.add_computed(job)
            else:
                self.batcher.add(job)
        while (plan := self.batcher.plan()) is not None:
            effects += [RunBatch(plan), self.steps.timer(self.batcher.in_flight, now_s)]
        effects += self.adapters.settle(self._adapters_used())
        effects += self.exchange.tiers.flush()
        effects += self.reporter.flush(now_s)
        if self._draining and self._empty():
            effects.append(Exit())
        return effects

    # --- Ends -------------------------------------------------------------------------------------

    def _leave(self, job: Job) -> None:
        """Its own references go; a lease keeps what is still to be read."""
        del self.jobs[job.request_id]
        self.batcher.remove(job)

    def _fail(self, job: Job, cause: str, **more: Any) -> list[Effect]:
        """`more`: fields of `AttemptFailed`."""
        return self._drop(*job.key) + self._failed(job.key, cause, **more)

    def _failed(self, key: tuple[RequestId, int], cause: str, **more: Any) -> list[Effect]:
        self.failures[cause.partition(":")[0]] += 1
        failed = AttemptFailed(request_id=key[0], attempt=key[1], cause=cause, **more)
        return [Send(SCHEDULER, failed)]

    def _drop(self, request_id: RequestId, attempt: int) -> list[Effect]:
        """Forget every attempt up to this one."""
        effects: list[Effect] = []
        job = self.jobs.get(request_id)
        if job is not None and job.attempt <= attempt:
            if self.exchange.holds(request_id):
                del self.jobs[request_id]
                effects = self.exchange.drop(request_id)
            else:
                self._leave(job)
        self.exchange.lender.drop(request_id, attempt)
        self.log.acknowledge(request_id, attempt)
        return effects

    def _half_lost(self, peer: NodeId) -> list[Effect]:
        """What waits for this peer's word, or it for ours, goes on nowhere."""
        lost = self.exchange.peer_down(peer, self._epochs.pop(peer, None))
        effects = [effect for job in lost for effect in self._fail(job, "prefill_lost")]
        for job in [job for job in self.jobs.values() if job.handover == peer]:
            effects += self._fail(job, "decode_lost")
        for request_id, attempt in self.exchange.lender.reader_down(peer):
            effects += self._failed((request_id, attempt), "decode_lost")
        return effects

    # --- Time -------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> list[Effect]:
        if stuck := self.exchange.reads.stuck(now_s - self.settings.stuck_s):
            return [Exit(f"READ {stuck} has not ended {self.settings.stuck_s:g} s after its time")]
        effects = self.exchange.tick(now_s)
        effects.append(SetTimer("tick", now_s + TICK_S))
        effects.append(Send(SCHEDULER, load_with_samples(self)))
        for job in self.log.tick(now_s):
            effects += self._fail(job, "unheard")
        for job in list(self.jobs.values()):
            if now_s > job.deadline_s + DEADLINE_SLACK_S:
                effects += self._fail(job, "deadline")
        return effects

    def _live(self) -> list[LiveRequest]:
        """All attempts, and those that have ended unheard, even by a scheduler that began anew."""
        halves = {
            key for key, handover in self.exchange.receiver.live.items() if handover.last is None
        }
        halves |= {job.request_id for job in self.jobs.values() if job.handover is not None}
        jobs = [*self.jobs.values(), *(ended.job for ended in self.log.ended.values())]
        return [LiveRequest(job.request_id, job.attempt, job.request_id in halves) for job in jobs]

    def _empty(self) -> bool:
        held = self.jobs or self.log.ended or self.batcher.busy
        return not held and self.exchange.idle
