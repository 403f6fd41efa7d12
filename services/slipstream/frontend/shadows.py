"""Copies of requests for a model that is only looked at: computed, counted, thrown away."""

from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric

from slipstream.errors import Problem
from slipstream.frontend.gateway import ClusterStatus, StreamItem
from slipstream.messages import TextDelta, Tokenize, TokenPrompt
from slipstream.runtime.metric_table import HTTP

SHADOWS_MAX = 64
"""At a time, of one frontend."""
LAST = 2**31 - 1
"""Priority: behind whatever somebody waits for."""

Open = Callable[[Tokenize, Callable[[StreamItem], None]], Callable[[], None]]


class Shadows:
    """Nobody waits for them: they are on nobody's account, and are not begun where many run."""

    def __init__(self) -> None:
        self.running: dict[str, Callable[[], None]] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        """(Name of the model or adapter, outcome)."""

    def copy(self, submission: Tokenize, name: str, status: ClusterStatus, open_: Open) -> None:
        """`status`: of who answers to `name`, if anybody does."""
        able = status.model and status.ready and not status.draining
        if not able or len(self.running) >= SHADOWS_MAX or not _fits_others(submission):
            self.counts[name, "skipped"] += 1
            return
        request_id = f"shadow-{submission.request_id}"
        own = msgspec.structs.replace(
            *(submission,),
            request_id=request_id,
            model=status.model,
            adapter=status.adapter,
            tenant="",
            weight=1,
            priority=LAST,
            clamp_max_tokens=True,
        )

        def put(item: StreamItem) -> None:
            failed = isinstance(item, Problem)
            if failed or (isinstance(item, TextDelta) and item.finish_reason is not None):
                self.counts[name, "failed" if failed else "finished"] += 1
                self.running.pop(request_id)()

        self.running[request_id] = open_(own, put)

    def close(self) -> None:
        for close in self.running.values():
            close()
        self.running.clear()

    def families(self) -> Iterator[Metric]:
        name = "slipstream_shadow_requests_total"
        family = CounterMetricFamily(name, HTTP[name], labels=["model_name", "outcome"])
        for (model, outcome), count in sorted(self.counts.items()):
            family.add_metric([model, outcome], count)
        yield family


def _fits_others(submission: Tokenize) -> bool:
    """Token ids mean something else to another model."""
    sampling = submission.sampling
    named = sampling.logit_bias or sampling.allowed_token_ids or sampling.stop_token_ids
    return not (isinstance(submission.prompt, TokenPrompt) or named)
