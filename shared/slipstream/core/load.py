"""What a worker says about itself, twice a second."""

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from slipstream.core.machine import BatchDone, BatchPlan
from slipstream.core.step_model import sample_of
from slipstream.messages import StepSample, WorkerLoad

if TYPE_CHECKING:
    from slipstream.core.worker import WorkerMachine


SAMPLES_MAX = 16
"""Of each kind in one load: with many steps in between, the last ones tell enough."""


class Samples:
    """Steps since the last load: what placement fits its prices to."""

    def __init__(self) -> None:
        # Apart, so that many steps of one kind do not push out the few of the other.
        self._prefills: deque[StepSample] = deque(maxlen=SAMPLES_MAX)
        self._decodes: deque[StepSample] = deque(maxlen=SAMPLES_MAX)

    def step(self, plan: BatchPlan, done: BatchDone) -> None:
        sample = sample_of(plan.rows, done.elapsed_s)
        (self._prefills if sample.prefill_tokens else self._decodes).append(sample)

    def drain(self) -> list[StepSample]:
        steps = [*self._prefills, *self._decodes]
        self._prefills.clear()
        self._decodes.clear()
        return steps


def load_with_samples(worker: "WorkerMachine") -> WorkerLoad:
    """Each sample is told once."""
    load = load_of(worker)
    steps, transfers = worker.samples.drain(), list(worker.exchange.reads.samples)
    worker.exchange.reads.samples.clear()
    return msgspec.structs.replace(load, step_samples=steps, transfer_samples=transfers)


def gauges_of(load: WorkerLoad) -> dict[str, float]:
    """The numbers in it."""
    fields = msgspec.structs.asdict(load)
    numbers = {name: value for name, value in fields.items() if isinstance(value, int)}
    return {**numbers, **load.counters}


def load_of(worker: "WorkerMachine") -> WorkerLoad:
    """Each block counts once: leased before used. At rest `used == cached` and `leased == 0`."""
    pool, batcher = worker.pool, worker.batcher
    leased = worker.exchange.lender.table.leased_blocks()
    return WorkerLoad(
        steps=batcher.steps,
        running=len(worker.jobs) - len(batcher.waiting),
        waiting=len(batcher.waiting),
        waiting_tokens=batcher.waiting_tokens,
        blocks_free=pool.num_empty,
        blocks_used=pool.num_blocks - pool.num_empty - len(leased),
        blocks_cached=pool.count_hashed() - pool.count_hashed(leased),
        blocks_leased=len(leased),
        counters=_counters(worker),
        blocks_from=dict(worker.exchange.reads.blocks_from),
    )


def _counters(worker: "WorkerMachine") -> dict[str, float]:
    batcher, exchange = worker.batcher, worker.exchange
    return {
        **worker.counted,
        "blocks_referenced": worker.pool.num_blocks - worker.pool.num_available,
        "blocks_evicted_total": worker.pool.evicted,
        "blocks_pulled_total": exchange.receiver.blocks_pulled,
        "blocks_fetched_total": exchange.fetcher.blocks_fetched,
        "blocks_loaded_total": exchange.tiers.blocks_loaded,
        "blocks_lent_total": exchange.lender.blocks_lent,
        "blocks_quarantined": sum(len(read.local) for read in exchange.reads.given_up.values()),
        "index_claims_total": worker.reporter.claims,
        "leases": len(exchange.lender.table.live),
        "leases_granted_total": exchange.lender.table.granted,
        "leases_lapsed_total": exchange.lender.table.lapsed,
        "preemptions_total": batcher.preemptions,
        "accepts_streams": float(worker.info.accept_decode),
        "prefix_hit_tokens_total": batcher.hit_tokens,
        "prefix_fetched_tokens_total": batcher.fetched_tokens,
        "prefix_query_tokens_total": batcher.queried_tokens,
        "index_claims_wrong_total": worker.reporter.claims_wrong,
        **{f"handover_{cause}_total": n for cause, n in exchange.receiver.failures.items()},
        **{f"fetch_{cause}_total": n for cause, n in exchange.fetcher.failures.items()},
        **{f"attempts_failed_{cause}_total": n for cause, n in worker.failures.items()},
    }
