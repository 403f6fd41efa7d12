"""What became of the HTTP requests of this frontend."""

from collections import Counter
from collections.abc import Iterator

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, Metric

from slipstream.errors import ERRORS
from slipstream.runtime.metric_table import HTTP

LEFT = 499
"""No status is sent to a client that is gone; this one is customary in counts."""
STATUS = web.RequestKey("status", int)
"""What the request came to, where that is not its response's status."""
_CODES = {str(code): 0 for code in (200, LEFT, *(spec.status for spec in ERRORS.values()))}
"""From the start, so that the first of a kind is seen as one more."""
ANSWERING = web.RequestKey("answering", bool)
"""The answer has begun."""


class HttpMetrics:
    def __init__(self) -> None:
        self._responses = Counter(_CODES)
        self._left = Counter({"before_answer": 0, "in_answer": 0})
        self.slow_readers_cut = 0

    def over(self, request: web.Request, status: int) -> None:
        """Those that ask for no work are not counted: probes would drown the rest."""
        if request.method != "POST":
            return
        status = request.get(STATUS, status)
        self._responses[str(status)] += 1
        if status == LEFT:
            self._left["in_answer" if request.get(ANSWERING) else "before_answer"] += 1

    def families(self) -> Iterator[Metric]:
        counted = {
            "slipstream_http_responses_total": ("code", self._responses),
            "slipstream_client_disconnects_total": ("reason", self._left),
        }
        for name, (label, counts) in counted.items():
            family = CounterMetricFamily(name, HTTP[name], labels=[label])
            for value, count in sorted(counts.items()):
                family.add_metric([value], count)
            yield family
        name = "slipstream_slow_readers_cut_total"
        yield CounterMetricFamily(name, HTTP[name], value=self.slow_readers_cut)
