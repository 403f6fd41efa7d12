"""What one run came to, as numbers, and a table of several."""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from slipstream.simulate.cluster import START_S, Cluster
from slipstream.simulate.trace import reusable_blocks
from slipstream.types import BLOCK_TOKENS


class Percentiles(msgspec.Struct, frozen=True):
    """Linear between ranks, as numpy's; zeros if there is nothing."""

    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    mean: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        if not len(values):
            return cls()
        found = np.asarray(values, dtype=np.float64)
        p50, p90, p99 = np.percentile(found, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99), float(found.mean()))


class WorkerSummary(msgspec.Struct, frozen=True, kw_only=True):
    busy_share: float
    """Of the time from the first arrival to the last end."""
    prefill_tokens: int
    decode_rows: int
    hit_tokens: int
    query_tokens: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Of latencies, requests that failed have no part; they are never good."""

    policy: str
    disaggregation: str
    rate_scale: float
    offered_per_s: float
    """Requests by the time between the first and the last arrival."""
    elapsed_s: float
    """Simulated, from the first arrival to the last end."""
    requests: int
    completed: int
    failed: dict[str, int]
    """Error code -> requests."""
    stopped_early: bool
    """Too many requests were late for `--good-share`, and the rest was left out."""

    ttft_s: Percentiles
    itl_s: Percentiles
    """Over every gap between two tokens of one request."""
    e2e_s: Percentiles
    good_share: float
    goodput_per_s: float
    missed_ttft: int
    """Requests that were answered, but not inside this limit; `missed_itl` too."""
    missed_itl: int

    hit_blocks: int
    """Leading blocks of prompts that were in the pool of the worker that began to compute them,
    those included that it had fetched for it."""
    fetched_blocks: int
    loaded_blocks: int
    """From host memory."""
    query_blocks: int
    hit_share: float
    reusable_share: float
    """What one cache without end would have hit."""

    placement_s: Percentiles
    """Processor time of the scheduler's calls that place."""
    placements: int
    migrated: int
    preemptions: int
    blocks_pulled: int
    read_failures: dict[str, int]
    """Of hand-overs and fetches, by cause."""
    imbalance: float
    """Time in steps, less what an empty step costs: the busiest worker over the mean, in the role
    where that is worst."""
    workers: dict[str, WorkerSummary]
    events: int
    wall_s: float


def summarize(cluster: Cluster, wall_s: float) -> Summary:
    run, driver = cluster.settings, cluster.driver
    streams = driver.streams
    ended = [stream for stream in streams if stream.ended_s is not None]
    done = [stream for stream in ended if not stream.problem]
    good = sum(run.limits.kept(stream) for stream in ended)
    elapsed_s = max(cluster.world.now_s - START_S, 1e-9)
    span_s = streams[-1].request.arrival_s - streams[0].request.arrival_s
    workers = cluster.workers.values()
    hit_blocks = sum(worker.batcher.hit_tokens for worker in workers) // BLOCK_TOKENS
    reusable, query_blocks = reusable_blocks(stream.request for stream in streams)
    failures: Counter[str] = Counter()
    for worker in workers:
        failures += worker.exchange.receiver.failures + worker.exchange.fetcher.failures
    scheduler = cluster.scheduler
    return Summary(
        policy=run.policy,
        disaggregation=run.disaggregation,
        rate_scale=run.rate_scale,
        offered_per_s=len(streams) / span_s if span_s else 0.0,
        elapsed_s=elapsed_s,
        requests=len(streams),
        completed=len(done),
        failed=dict(Counter(stream.problem for stream in ended if stream.problem)),
        stopped_early=driver.open > 0,
        ttft_s=Percentiles.of([stream.first_s for stream in done]),
        itl_s=Percentiles.of(driver.gaps_s),
        e2e_s=Percentiles.of([stream.ended_s or 0.0 for stream in done]),
        good_share=good / len(streams),
        goodput_per_s=good / elapsed_s,
        missed_ttft=sum(stream.first_s > run.limits.ttft_s for stream in done),
        missed_itl=sum(stream.mean_itl_s > run.limits.itl_s for stream in done),
        hit_blocks=hit_blocks,
        fetched_blocks=sum(worker.exchange.fetcher.blocks_fetched for worker in workers),
        loaded_blocks=sum(worker.exchange.tiers.blocks_loaded for worker in workers),
        query_blocks=query_blocks,
        hit_share=hit_blocks / max(1, query_blocks),
        reusable_share=reusable / max(1, query_blocks),
        placement_s=Percentiles.of(scheduler.placement_s),
        placements=len(scheduler.placement_s),
        migrated=scheduler.inner.counters["migrated"],
        preemptions=sum(worker.batcher.preemptions for worker in workers),
        blocks_pulled=sum(worker.exchange.receiver.blocks_pulled for worker in workers),
        read_failures=dict(failures),
        imbalance=_imbalance(cluster),
        workers={name: _worker(cluster, name, elapsed_s) for name in cluster.workers},
        events=cluster.world.events,
        wall_s=wall_s,
    )


def _worker(cluster: Cluster, name: str, elapsed_s: float) -> WorkerSummary:
    process, machine = cluster.world.processes[name], cluster.workers[name]
    return WorkerSummary(
        busy_share=process.busy_s / elapsed_s,
        prefill_tokens=process.prefill_tokens,
        decode_rows=process.decode_rows,
        hit_tokens=machine.batcher.hit_tokens,
        query_tokens=machine.batcher.queried_tokens,
    )


def _imbalance(cluster: Cluster) -> float:
    by_role: dict[str, list[float]] = {}
    for name in cluster.workers:
        work_s = cluster.world.processes[name].work_s
        by_role.setdefault(name.partition("-")[0], []).append(work_s)
    return max(max(times) * len(times) / max(sum(times), 1e-9) for times in by_role.values())


_COLUMNS = (
    *("policy", "disagg.", "scale", "req/s", "good", "good/s"),
    *("TTFT p50", "p90", "p99 s", "ITL p50", "p90", "p99 ms", "E2E p50 s"),
    *("hit", "fetched", "of", "place µs", "p99", "imbal.", "failed", "migr.", "wall s"),
)


def table(summaries: Iterable[Summary]) -> str:
    """Markdown, aligned for a terminal."""
    rows = [_COLUMNS, *(_row(summary) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "| "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def _row(summary: Summary) -> tuple[str, ...]:
    ttft, itl, placement = summary.ttft_s, summary.itl_s, summary.placement_s
    return (
        *(summary.policy, summary.disaggregation, f"{summary.rate_scale:g}"),
        *(f"{summary.offered_per_s:.1f}", f"{summary.good_share:.1%}"),
        f"{summary.goodput_per_s:.1f}",
        *(f"{ttft.p50:.2f}", f"{ttft.p90:.2f}", f"{ttft.p99:.2f}"),
        *(f"{itl.p50 * 1e3:.1f}", f"{itl.p90 * 1e3:.1f}", f"{itl.p99 * 1e3:.1f}"),
        *(f"{summary.e2e_s.p50:.1f}", f"{summary.hit_share:.1%}"),
        f"{summary.fetched_blocks / max(1, summary.query_blocks):.1%}",
        f"{summary.reusable_share:.1%}",
        *(f"{placement.p50 * 1e6:.0f}", f"{placement.p99 * 1e6:.0f}"),
        *(f"{summary.imbalance:.2f}", f"{sum(summary.failed.values())}", f"{summary.migrated}"),
        f"{summary.wall_s:.0f}",
    )
