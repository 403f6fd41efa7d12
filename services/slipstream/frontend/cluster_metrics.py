"""What the scheduler says of itself and of the workers once a second, as families: each of them by
itself, and the cluster as a whole in vLLM's words."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from slipstream.messages import SCHEDULER, NodeInfo
from slipstream.runtime.metric_table import VLLM
from slipstream.runtime.metrics import PREFIX, families
from slipstream.types import BLOCK_TOKENS, NodeId, Role

Load = Mapping[NodeId, Mapping[str, float]]

SUMMED = {
    "vllm:num_preemptions_total": ("preemptions_total",),
    "vllm:prefix_cache_queries_total": ("prefix_query_tokens_total",),
    "vllm:prefix_cache_hits_total": ("prefix_hit_tokens_total", "prefix_fetched_tokens_total"),
    "vllm:external_prefix_cache_hits_total": ("prefix_fetched_tokens_total",),
    "vllm:spec_decode_num_draft_tokens_total": ("draft_tokens_total",),
    "vllm:spec_decode_num_accepted_tokens_total": ("draft_tokens_right_total",),
}
"""What workers count: the first, less the second."""
_WAITING = ("recovering", "locating", "queued", "resuming")
_KNOWN_MAX = 1024


class ClusterMetrics:
    def __init__(self) -> None:
        self._sums: dict[str, dict[str, GrowingSum]] = {}
        """Model -> counter -> its sum over the model's workers."""

    def nodes(self, load: Load, nodes: Mapping[NodeId, NodeInfo]) -> Iterator[Metric]:
        """Families of the scheduler and of each worker."""
        workers = []
        for node_id, gauges in sorted(load.items()):
            if node_id == SCHEDULER:
                said = [({"node_id": node_id, "role": Role.SCHEDULER.value}, gauges)]
                yield from families(f"{PREFIX}scheduler_", (Role.SCHEDULER,), said)
            else:
                known = nodes.get(node_id)
                role = known.role.value if known is not None else "unknown"
                model = known.model if known is not None else ""
                labels = {"node_id": node_id, "role": role, "model_name": model}
                workers.append((labels, gauges))
        yield from families(f"{PREFIX}worker_", (Role.DECODE,), workers)

    def cluster(
        self, workers: Load, requests: Mapping[str, int], labels: Mapping[str, str]
    ) -> Iterator[Metric]:
        """Families of all workers of a model together; `requests` for it, by their states."""
        locally = _sum(workers, "waiting")
        placed = requests.get("prefilling", 0) + requests.get("decoding", 0)
        queued = sum(requests.get(state, 0) for state in _WAITING)
        blocks = sum(_sum(workers, f"blocks_{kind}") for kind in ("free", "used", "leased"))
        used = _sum(workers, "blocks_referenced")
        gauges = {
            "vllm:num_requests_running": max(0, placed - locally),
            "vllm:num_requests_waiting": queued + locally,
            "vllm:kv_cache_usage_perc": used / blocks if blocks else 0,
        }
        for name, value in gauges.items():
            yield _one(GaugeMetricFamily(name, VLLM[name], labels=list(labels)), labels, value)
        name = "vllm:cache_config_info"
        more = {"block_size": str(BLOCK_TOKENS), "num_gpu_blocks": str(int(blocks)), **labels}
        yield _one(GaugeMetricFamily(name, VLLM[name], labels=list(more)), more, 1)
        yield from self._counters(workers, labels)

    def adapters(
        self, names: Sequence[str], unix_s: float, labels: Mapping[str, str]
    ) -> Iterator[Metric]:
        """A model's LoRA adapters, as llm-d's router looks for them: all are on all workers, so
        that none waits, and none is loaded because somebody asks for it."""
        if names:
            name, listed = "vllm:lora_requests_info", ",".join(names)
            told = {
                "max_lora": str(len(names)),
                "running_lora_adapters": listed,
                "waiting_lora_adapters": "",
                **labels,
            }
            yield _one(GaugeMetricFamily(name, VLLM[name], labels=list(told)), told, unix_s)

    def _counters(self, workers: Load, labels: Mapping[str, str]) -> Iterator[Metric]:
        counted = {key for keys in SUMMED.values() for key in keys}
        fresh = {key: GrowingSum() for key in counted}
        sums = self._sums.setdefault(labels["model_name"], fresh)
        for key, total in sums.items():
            total.take({node_id: gauges.get(key, 0) for node_id, gauges in workers.items()})
        values = {
            name: sums[keys[0]].value - sum(sums[less].value for less in keys[1:])
            for name, keys in SUMMED.items()
        }
        values["vllm:external_prefix_cache_queries_total"] = (
            values["vllm:prefix_cache_queries_total"] - values["vllm:prefix_cache_hits_total"]
        )
        for name, value in values.items():
            yield _one(CounterMetricFamily(name, VLLM[name], labels=list(labels)), labels, value)


class GrowingSum:
    """Of counters that begin anew at 0 with their processes; the sum does not shrink with them,
    which Prometheus would take for a new beginning of everything."""

    def __init__(self) -> None:
        self.value = 0.0
        self._last: dict[NodeId, float] = {}

    def take(self, now: Mapping[NodeId, float]) -> None:
        for node_id, value in now.items():
            last = self._last.pop(node_id, 0.0)
            self.value += value - last if value >= last else value
            self._last[node_id] = value  # who was heard of last stands last
        while len(self._last) > _KNOWN_MAX:
            del self._last[next(iter(self._last))]


def _one(
    family: CounterMetricFamily | GaugeMetricFamily, labels: Mapping[str, str], value: float
) -> Metric:
    family.add_metric(list(labels.values()), value)
    return family


def _sum(workers: Load, key: str) -> float:
    return sum(gauges.get(key, 0) for gauges in workers.values())
