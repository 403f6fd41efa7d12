"""What a worker says about itself, twice a second."""

from typing import TYPE_CHECKING

from slipstream.messages import WorkerLoad

if TYPE_CHECKING:
    from slipstream.core.worker import WorkerMachine


def load_of(worker: "WorkerMachine") -> WorkerLoad:
    """Each block counts once: leased before used. At rest `used == cached` and `leased == 0`."""
    pool, batcher = worker.pool, worker.batcher
    leased = worker.lender.table.leased_blocks()
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
    )


def _counters(worker: "WorkerMachine") -> dict[str, float]:
    batcher, receiver = worker.batcher, worker.receiver
    return {
        "blocks_pulled_total": receiver.blocks_pulled,
        "blocks_quarantined": sum(
            len(handover.job.block_ids) for handover in receiver.zombies.values()
        ),
        "leases_lapsed_total": worker.lender.table.lapsed,
        "preemptions_total": batcher.preemptions,
        "prefix_hit_tokens_total": batcher.hit_tokens,
        "prefix_query_tokens_total": batcher.queried_tokens,
        "index_claims_total": worker.reporter.claims,
        "index_claims_wrong_total": worker.reporter.claims_wrong,
        **{f"handover_{cause}_total": n for cause, n in receiver.failures.items()},
        **{f"attempts_failed_{cause}_total": n for cause, n in worker.failures.items()},
    }
