"""What a cluster said at two moments, and what happened in between. Neither asks nor prints."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from slipstream.frontend.cluster import Cluster, Worker

RATES_OVER_S = 5.0
"""Workers report once a second: over less, a rate would jump."""
LATENCIES_OVER_S = 30.0
_WORKER = "slipstream_worker_"
_WORKER_LABELS = {"node_id", "role", "model_name"}
_FRONTEND = "frontend"
_FIRST = "vllm:time_to_first_token_seconds"
_GAP = "vllm:inter_token_latency_seconds"


class Metrics(msgspec.Struct, frozen=True):
    """Of /metrics what the table needs."""

    frontend: str
    """Whose it is: behind an ingress each request may come to another one."""
    of_worker: Mapping[tuple[str, str], float]
    """(node id, name behind `slipstream_worker_`) -> value."""
    responses: Mapping[int, float]
    """HTTP status -> answers."""
    buckets: Mapping[str, Mapping[float, float]]
    """Histogram -> upper edge, s -> observations up to it."""


class Sample(msgspec.Struct, frozen=True):
    at_s: float
    cluster: Cluster
    metrics: Metrics


class Pair(msgspec.Struct, frozen=True):
    p50: float | None = None
    p95: float | None = None


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """None: it cannot be said yet."""

    node_id: str
    state: str
    running: int = 0
    waiting: int = 0
    kv_used: float | None = None
    """Share of the pool that something needs now."""
    kv_cached: float | None = None
    """Share that a prefix may hit; of it some is needed too."""
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    step_ms: float | None = None
    blocks_in_per_s: float | None = None
    prefix_hits: float | None = None
    """Share of prompt tokens that were found; since its start where none came lately."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """One table."""

    state: str
    model: str
    workers: Sequence[WorkerView]
    services: Mapping[str, str]
    """Node id -> state."""
    requests: Mapping[str, int]
    """The scheduler's states that some are in."""
    requests_live: int
    """Of the frontend that was asked."""
    requests_per_s: float | None
    """That the scheduler took."""
    refused_per_s: float | None
    failed_per_s: float | None
    tokens_per_s: float | None
    """That the frontend passed on."""
    prompt_tokens_per_s: float | None
    ttft_ms: Pair
    itl_ms: Pair


def read_metrics(text: str) -> Metrics:
    """ValueError: it is not Prometheus' text."""
    frontend = ""
    of_worker: dict[tuple[str, str], float] = {}
    responses: dict[int, float] = {}
    buckets: dict[str, dict[float, float]] = {_FIRST: {}, _GAP: {}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if labels.get("role") == _FRONTEND:
                frontend = labels["node_id"]
            if sample.name.startswith(_WORKER) and labels.keys() == _WORKER_LABELS:
                of_worker[labels["node_id"], sample.name.removeprefix(_WORKER)] = sample.value
            elif sample.name == "slipstream_http_responses_total":
                responses[int(labels["code"])] = sample.value
            elif family.name in buckets and sample.name.endswith("_bucket"):
                edges = buckets[family.name]
                edge = float(labels["le"])
                edges[edge] = edges.get(edge, 0.0) + sample.value
    return Metrics(frontend, of_worker, responses, buckets)


def view(samples: Sequence[Sample]) -> View:
    """Of the latest one, against those before it; `samples` ascend in time."""
    now = samples[-1]
    # Each frontend counts by itself, and the two pages of a sample may be of two of them.
    same = [one for one in samples if _frontend(one) == _frontend(now)]
    counted = [one for one in samples if one.metrics.frontend == now.metrics.frontend]
    before = _since(same, now.at_s - RATES_OVER_S)
    lately = _since(counted, now.at_s - RATES_OVER_S)
    early = _since(counted, now.at_s - LATENCIES_OVER_S)
    cluster, requests = now.cluster, now.cluster.requests
    states = {name: n for name, n in requests.states.items() if n} if requests else {}

    def rate(count: Callable[[Sample], float | None], past: Sample = before) -> float | None:
        return _rate(count(past), count(now), past, now)

    workers = [_worker(worker, before, now) for worker in cluster.workers]
    return View(
        state="draining" if cluster.draining else "ready" if cluster.ready else cluster.reason,
        model=", ".join(model.name for model in cluster.models if model.parent is None),
        workers=workers,
        services={one.node_id: "draining" if one.draining else "up" for one in cluster.services},
        requests=states,
        requests_live=cluster.frontend.requests_live,
        requests_per_s=rate(_accepted),
        refused_per_s=rate(lambda one: _answers(one, 429, 429), lately),
        failed_per_s=rate(lambda one: _answers(one, 500, 599), lately),
        tokens_per_s=rate(lambda one: one.cluster.frontend.tokens_total),
        prompt_tokens_per_s=_sum(worker.prompt_tokens_per_s for worker in workers),
        ttft_ms=_quantiles(early, now, _FIRST),
        itl_ms=_quantiles(early, now, _GAP),
    )


def _frontend(sample: Sample) -> str:
    return sample.cluster.frontend.node_id


def _accepted(sample: Sample) -> int | None:
    requests = sample.cluster.requests
    return requests.accepted_total if requests is not None else None


def _since(samples: Sequence[Sample], at_s: float) -> Sample:
    return next(one for one in samples if one.at_s >= at_s or one is samples[-1])


def _worker(worker: Worker, before: Sample, now: Sample) -> WorkerView:
    load, name = worker.load, worker.node_id
    if load is None:
        return WorkerView(node_id=name, state="silent")
    past = next((one for one in before.cluster.workers if one.node_id == name), None)
    same = past is not None and past.epoch == worker.epoch and before is not now
    old = past.load if same and past is not None else None
    rates = (before, now) if old is not None else (now, now)

    def rate(key: str) -> float | None:
        first, last = (one.metrics.of_worker.get((name, key)) for one in rates)
        return _rate(first, last, *rates)

    steps = load.steps_total - (old.steps_total if old is not None else 0)
    step_s = load.step_seconds_total - (old.step_seconds_total if old is not None else 0.0)
    hits, asked = load.prefix_hit_tokens_total, load.prefix_query_tokens_total
    if old is not None and asked > old.prefix_query_tokens_total:
        hits -= old.prefix_hit_tokens_total
        asked -= old.prefix_query_tokens_total
    came = sum(old.blocks_from.values()) if old is not None else None
    needed = now.metrics.of_worker.get((name, "blocks_referenced"))
    return WorkerView(
        node_id=name,
        state=_state(worker),
        running=load.running,
        waiting=load.waiting,
        kv_used=_share(needed, worker.num_blocks),
        kv_cached=_share(load.blocks.cached, worker.num_blocks),
        tokens_per_s=rate("tokens_total"),
        prompt_tokens_per_s=rate("prompt_tokens_total"),
        step_ms=1e3 * step_s / steps if steps > 0 else None,
        blocks_in_per_s=_rate(came, sum(load.blocks_from.values()), *rates),
        prefix_hits=_share(hits, asked),
    )


def _state(worker: Worker) -> str:
    if worker.draining:
        return "draining"
    if worker.computes_prompts and worker.accepts_streams:
        return "both"
    return "prompts" if worker.computes_prompts else "streams"


def _share(part: float | None, whole: float) -> float | None:
    return part / whole if part is not None and whole > 0 else None


def _rate(old: float | None, new: float | None, before: Sample, now: Sample) -> float | None:
    """A counter that shrank began anew."""
    seconds = now.at_s - before.at_s
    if old is None or new is None or seconds <= 0 or new < old:
        return None
    return (new - old) / seconds


def _sum(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None


def _answers(sample: Sample, low: int, high: int) -> float:
    return sum(n for code, n in sample.metrics.responses.items() if low <= code <= high)


def _quantiles(before: Sample, now: Sample, name: str) -> Pair:
    """In ms, of what was observed between the two."""
    new, old = now.metrics.buckets[name], before.metrics.buckets[name]
    counts = {edge: count - old.get(edge, 0.0) for edge, count in new.items()}
    if before is now or not max(counts.values(), default=0.0) > 0 or min(counts.values()) < 0:
        return Pair()
    return Pair(*(1e3 * quantile(counts, share) for share in (0.5, 0.95)))


def quantile(buckets: Mapping[float, float], share: float) -> float:
    """As Prometheus estimates it: evenly spread between a bucket's edges; of what lies above the
    last one that edge. `buckets`: upper edge -> how many up to it, infinity among them."""
    edges = sorted(buckets)
    wanted = share * buckets[edges[-1]]
    low, below = 0.0, 0.0
    for edge in edges:
        if buckets[edge] >= wanted:
            if edge == float("inf"):
                break
            inside = buckets[edge] - below
            return low + (edge - low) * ((wanted - below) / inside if inside else 1.0)
        low, below = edge, buckets[edge]
    return low
