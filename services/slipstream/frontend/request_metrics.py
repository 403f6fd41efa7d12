"""What requests of this frontend took, in vLLM's words. Each choice is a request, as there."""

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric

from slipstream.errors import ERRORS, Problem
from slipstream.frontend.gateway import StreamItem
from slipstream.messages import TextDelta, Tokenize
from slipstream.runtime.metric_table import VLLM
from slipstream.runtime.metrics import Distribution
from slipstream.types import FinishReason, count_tokens

# vLLM's edges are all in here, so that queries for one of them find it.
GAP_EDGES_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
FIRST_EDGES_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
WHOLE_EDGES_S = (
    *(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0),
    *(15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_EDGES = tuple(m * 10.0**e for e in range(6) for m in (1, 2, 5))
EDGES = {
    "vllm:time_to_first_token_seconds": FIRST_EDGES_S,
    "vllm:inter_token_latency_seconds": GAP_EDGES_S,
    "vllm:request_time_per_output_token_seconds": GAP_EDGES_S,
    "vllm:e2e_request_latency_seconds": WHOLE_EDGES_S,
    "vllm:request_decode_time_seconds": WHOLE_EDGES_S,
    "vllm:request_prompt_tokens": TOKEN_EDGES,
    "vllm:request_prefill_kv_computed_tokens": TOKEN_EDGES,
    "vllm:request_generation_tokens": TOKEN_EDGES,
    "vllm:request_params_max_tokens": TOKEN_EDGES,
}
GAPS_MAX = 1024
"""Between two tokens, kept to be counted together: that costs a tenth of counting each one."""


class RequestMetrics:
    """Lives on the loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.gaps_s: list[float] = []
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.ended = {reason.value: 0 for reason in FinishReason}
        self._distributions = {name: Distribution(edges) for name, edges in EDGES.items()}

    def watch(
        self, submission: Tokenize, put: Callable[[StreamItem], None], max_model_len: int
    ) -> "Watched":
        return Watched(self, submission, put, max_model_len)

    def observe(self, name: str, value: float) -> None:
        """`name`: behind `vllm:`."""
        self._distributions[f"vllm:{name}"].observe(value)

    def count_gaps(self) -> None:
        self._distributions["vllm:inter_token_latency_seconds"].observe_all(self.gaps_s)
        self.gaps_s.clear()

    def families(self, labels: Mapping[str, str]) -> Iterator[Metric]:
        self.count_gaps()
        for name, distribution in self._distributions.items():
            yield distribution.family(name, VLLM[name], labels)
        counts = {
            "vllm:prompt_tokens_total": self.prompt_tokens,
            "vllm:prompt_tokens_cached_total": self.cached_tokens,
            "vllm:generation_tokens_total": self.generation_tokens,
        }
        for name, count in counts.items():
            family = CounterMetricFamily(name, VLLM[name], labels=list(labels))
            family.add_metric(list(labels.values()), count)
            yield family
        name = "vllm:request_success_total"
        family = CounterMetricFamily(name, VLLM[name], labels=[*labels, "finished_reason"])
        for reason, count in self.ended.items():
            family.add_metric([*labels.values(), reason], count)
        yield family


class Watched:
    """One request on its way: passes items on, and remembers when they came."""

    __slots__ = (
        *("_begun_s", "_clock", "_ended", "_first_s", "_last_s", "_max_model_len", "_metrics"),
        *("_prompt_tokens", "_put", "_submission", "_tokens"),
    )

    def __init__(
        self,
        metrics: RequestMetrics,
        submission: Tokenize,
        put: Callable[[StreamItem], None],
        max_model_len: int,
    ) -> None:
        self._metrics, self._submission, self._put = metrics, submission, put
        self._max_model_len = max_model_len
        self._clock = metrics.clock
        self._begun_s = self._clock()
        self._first_s = self._last_s = self._begun_s
        self._prompt_tokens = self._tokens = 0
        self._ended = False

    def take(self, item: StreamItem) -> None:
        """Called for every token: what it does is counted in tenths of a microsecond."""
        self._put(item)
        if isinstance(item, TextDelta):
            if item.tokens:
                self._arrived(item)
            if item.finish_reason is not None:
                self._finished(item)
        elif isinstance(item, Problem):
            self._failed(item)
        else:
            self._prompt_tokens = item

    def close(self) -> None:
        """Nobody waits for it any more."""
        if not self._ended:
            self._end(FinishReason.ABORT)

    def _arrived(self, delta: TextDelta) -> None:
        metrics, now_s = self._metrics, self._clock()
        if self._tokens:
            metrics.gaps_s.append(now_s - self._last_s)
            if len(metrics.gaps_s) >= GAPS_MAX:
                metrics.count_gaps()
        else:
            self._first_s = now_s
            metrics.observe("time_to_first_token_seconds", now_s - self._begun_s)
            metrics.prompt_tokens += self._prompt_tokens
        tokens = count_tokens(delta.tokens)
        self._last_s = now_s
        self._tokens += tokens
        metrics.generation_tokens += tokens

    def _finished(self, delta: TextDelta) -> None:
        assert delta.finish_reason is not None
        self._end(delta.finish_reason)
        if delta.finish_reason is FinishReason.ERROR:
            return
        metrics = self._metrics
        cached = delta.usage.cached_tokens if delta.usage is not None else 0
        decode_s = self._last_s - self._first_s
        metrics.cached_tokens += cached
        metrics.observe("e2e_request_latency_seconds", self._clock() - self._begun_s)
        metrics.observe("request_decode_time_seconds", decode_s)
        if self._tokens > 1:
            per_token_s = decode_s / (self._tokens - 1)
            metrics.observe("request_time_per_output_token_seconds", per_token_s)
        metrics.observe("request_prompt_tokens", self._prompt_tokens)
        metrics.observe("request_prefill_kv_computed_tokens", self._prompt_tokens - cached)
        metrics.observe("request_generation_tokens", self._tokens)
        metrics.observe("request_params_max_tokens", self._allowed())

    def _failed(self, problem: Problem) -> None:
        self._ended = True
        if ERRORS[problem.code].status >= 500:  # else the client's fault, or no room: it never ran
            self._end(FinishReason.ERROR)

    def _end(self, reason: FinishReason) -> None:
        self._ended = True
        self._metrics.ended[reason.value] += 1

    def _allowed(self) -> int:
        wanted = self._submission.sampling.max_tokens
        if not (self._submission.clamp_max_tokens and self._max_model_len):
            return wanted
        return min(wanted, self._max_model_len - self._prompt_tokens)
