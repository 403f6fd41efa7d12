"""The frontend's shell half: the HTTP server in front of the machine, and the gateway between."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client.core import GaugeMetricFamily, Metric

from slipstream.config import is_loopback
from slipstream.core.machine import (
    Closed,
    CodecAsked,
    Deliver,
    DeliverCodec,
    DeliverTrace,
    Effect,
    Event,
    Opened,
    Taken,
    TraceAsked,
)
from slipstream.core.submission import TAKEN
from slipstream.frontend.app import NO_BOOKS, AppSettings, Books, build_app, make_runner
from slipstream.frontend.cluster import Cluster, cluster
from slipstream.frontend.cluster_metrics import ClusterMetrics
from slipstream.frontend.context import CONTEXT
from slipstream.frontend.gateway import ClusterStatus, StreamItem
from slipstream.frontend.machine import FrontendMachine
from slipstream.frontend.request_metrics import RequestMetrics
from slipstream.messages import Prompt, Tokenize, TraceFound, WorkerInfo
from slipstream.runtime.metric_table import HTTP
from slipstream.runtime.metrics import metrics, text
from slipstream.runtime.ports import port_error
from slipstream.spans import TraceContext
from slipstream.types import RequestId

SHUTDOWN_TIMEOUT_S = 2.0
"""For answers that are written but not sent yet; shorter than what the shell grants."""

TRACE_TIMEOUT_S = 2.0
TRACES_ASKED_MAX = 4
"""At a time, for an answer can be a megabyte; one more is told that nobody answers."""

_log = logging.getLogger("slipstream.frontend")


class FrontendService:
    """Executor of the machine's effects, and `Gateway` of the HTTP handlers. Lives on one loop."""

    def __init__(
        self,
        machine: FrontendMachine,
        settings: AppSettings,
        host: str,
        port: int,
        model: str = "",
        books: Books = NO_BOOKS,
    ) -> None:
        """`model`: its name in the API; empty: as the workers say. `port` 0: any free one, which
        is then in `port`."""
        self.port = port
        self._machine, self._host = machine, host
        self._model = model
        self._worker: WorkerInfo | None = None
        self._streams: dict[RequestId, Callable[[StreamItem], None]] = {}
        self._calls: dict[str, asyncio.Future[DeliverCodec]] = {}
        self._traces: dict[str, asyncio.Future[TraceFound]] = {}
        self._requests, self._cluster = RequestMetrics(), ClusterMetrics()
        self._defaults = settings.default_sampling
        self._asks_for_keys = bool(settings.api_keys_file)
        self._books, app = books, build_app(self, settings, books)
        self._usage = app[CONTEXT].usage
        self._runner = make_runner(app, SHUTDOWN_TIMEOUT_S)

    # --- Executor ---

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self.port).start()
        except OSError as error:
            where = ("slipstream frontend", "--port", self._host, self.port)
            raise port_error(*where, error) from None
        self.port = self._runner.addresses[0][1]
        _log.info("HTTP on %s:%d", self._host, self.port)
        if not self._asks_for_keys and not is_loopback(self._host):
            _log.warning("whoever reaches %s may ask: no --api-keys-file is given", self._host)
        if self._defaults:
            said = ", ".join(f"{name} {value:g}" for name, value in self._defaults.items())
            _log.info("generation_config.json: where a client says nothing, %s", said)

    def execute(self, effect: Effect) -> None:
        match effect:
            case Deliver(request_id, item):
                put = self._streams.get(request_id)
                if put is not None:
                    put(item)
            case DeliverCodec(call_id):
                future = self._calls.pop(call_id, None)
                if future is not None and not future.done():
                    future.set_result(effect)
            case DeliverTrace(found):
                asked = self._traces.get(found.call_id)
                if asked is not None and not asked.done():
                    asked.set_result(found)
            case _:
                raise AssertionError(f"not for a frontend: {type(effect).__name__}")

    async def close(self) -> None:
        """After the machine's last word: sends what is written, then closes every connection."""
        await self._runner.cleanup()
        if self._books.journal is not None:
            await self._books.journal.close()
        if self._books.audit is not None:
            await asyncio.to_thread(self._books.audit.close)

    # --- Gateway ---

    def status(self) -> ClusterStatus:
        machine, membership = self._machine, self._machine.membership
        now_s = time.monotonic()
        reason = machine.patience.missing(now_s)
        offered = [node.worker for node in membership.nodes.values() if node.worker is not None]
        if offered:
            # Kept: who asks for the model while every worker is away is told to come again.
            self._worker = min(offered, key=lambda worker: worker.max_model_len)
        worker = self._worker
        return ClusterStatus(
            ready=not reason,
            draining=machine.draining,
            reason=reason,
            refuses=machine.patience.over(now_s),
            model=self._model or (worker.model if worker else ""),
            max_model_len=worker.max_model_len if worker else 0,
            vocab_size=worker.vocab_size if worker else 0,
            nodes=list(membership.nodes.values()),
            retry_after_s=machine.settings.retry_after_s,
            running=self._summed("running"),
            waiting=self._summed("waiting"),
        )

    def open(
        self,
        submission: Tokenize,
        put: Callable[[StreamItem], None],
        context: TraceContext,
        model: str,
        taken: Taken | None = None,
    ) -> Callable[[], None]:
        request_id = submission.request_id
        worker = self._worker
        watched = self._requests.watch(submission, put, worker.max_model_len if worker else 0)
        before = self._streams.get(request_id)
        if before is not None:  # its client has come back before its connection was seen to break
            before(TAKEN)
        self._streams[request_id] = watched.take
        self._post(Opened(submission, context, model, taken))

        def close() -> None:
            if self._streams.get(request_id) == watched.take:
                del self._streams[request_id]
                watched.close()
                self._post(Closed(request_id))

        return close

    async def codec(self, prompt: Prompt | None, tokens: bytes) -> DeliverCodec:
        call_id = uuid.uuid4().hex
        future: asyncio.Future[DeliverCodec] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._post(CodecAsked(call_id, prompt, tokens))
        try:
            return await future
        finally:
            self._calls.pop(call_id, None)

    async def trace(self, name: str) -> TraceFound | None:
        if len(self._traces) >= TRACES_ASKED_MAX:
            return None
        call_id = uuid.uuid4().hex
        future: asyncio.Future[TraceFound] = asyncio.get_running_loop().create_future()
        self._traces[call_id] = future
        self._post(TraceAsked(call_id, name))
        try:
            return await asyncio.wait_for(future, TRACE_TIMEOUT_S)
        except TimeoutError:
            return None
        finally:
            del self._traces[call_id]

    def cluster(self) -> Cluster:
        machine = self._machine
        node_id = machine.membership.node.node_id
        return cluster(self.status(), machine.load, node_id, machine.statistics())

    def metrics(self) -> bytes:
        node = self._machine.membership.node
        said = self._machine.statistics()
        for book in (self._books.journal, self._usage, self._books.audit):
            said |= book.statistics() if book is not None else {}
        own = metrics(said, node.node_id, node.role, shell=False)
        return own + text(self._families())

    def _families(self) -> Iterator[Metric]:
        status, load = self.status(), self._machine.load.gauges
        ready = "slipstream_ready"
        yield GaugeMetricFamily(ready, HTTP[ready], float(status.ready and not status.draining))
        yield from self._cluster.nodes(load, self._machine.membership.nodes)
        if status.model:  # without it nobody has asked for anything yet
            labels = {"model_name": status.model}
            yield from self._cluster.cluster(load, labels)
            yield from self._requests.families(labels)

    def _summed(self, name: str) -> int:
        return int(sum(gauges.get(name, 0) for gauges in self._machine.load.gauges.values()))
