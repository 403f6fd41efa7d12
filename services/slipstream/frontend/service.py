"""The frontend's shell half: the HTTP server in front of the machine, and the gateway between."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import msgspec
from aiohttp import web
from prometheus_client.core import GaugeMetricFamily, Metric

from slipstream.config import is_loopback
from slipstream.core.machine import (
    AdapterAsked,
    Closed,
    CodecAsked,
    Deliver,
    DeliverAdapter,
    DeliverCodec,
    DeliverTrace,
    Effect,
    Event,
    Opened,
    Taken,
    TraceAsked,
)
from slipstream.core.submission import TAKEN
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.app import NO_BOOKS, AppSettings, Books, build_app, make_runner
from slipstream.frontend.cluster import Cluster, cluster
from slipstream.frontend.cluster_metrics import ClusterMetrics
from slipstream.frontend.context import CONTEXT
from slipstream.frontend.gateway import ClusterStatus, ModelCard, StreamItem
from slipstream.frontend.machine import FrontendMachine
from slipstream.frontend.models import Known, Models
from slipstream.frontend.request_metrics import RequestMetrics
from slipstream.frontend.routes import Routes, read
from slipstream.frontend.shadows import Shadows
from slipstream.frontend.watched import Watched
from slipstream.messages import (
    AdapterChanged,
    AdapterInfo,
    ChangeAdapter,
    Prompt,
    Tokenize,
    TraceFound,
)
from slipstream.runtime.metric_table import HTTP
from slipstream.runtime.metrics import merged, metrics, text
from slipstream.runtime.ports import port_error
from slipstream.spans import TraceContext
from slipstream.types import RequestId

SHUTDOWN_TIMEOUT_S = 2.0
"""For answers that are written but not sent yet; shorter than what the shell grants."""

ADAPTER_TIMEOUT_S = 90.0
"""Longer than the scheduler waits for the workers."""
DRAIN_SEEN_S = 0.5
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
        books: Books = NO_BOOKS,
    ) -> None:
        """`port` 0: any free one, which is then in `port`. SetupError: a file of the settings
        cannot be used."""
        self.port = port
        self._machine, self._host = machine, host
        self._models = Models()
        self._routes = Watched(settings.routes_file, read, Routes())
        self._shadows = Shadows()
        self._streams: dict[RequestId, Callable[[StreamItem], None]] = {}
        self._calls: dict[str, asyncio.Future[DeliverCodec]] = {}
        self._traces: dict[str, asyncio.Future[TraceFound]] = {}
        self._changes: dict[str, asyncio.Future[AdapterChanged]] = {}
        self._requests: dict[str, RequestMetrics] = {}
        self._cluster = ClusterMetrics()
        self._asks_for_keys = bool(settings.api_keys_file)
        self._books, app = books, build_app(self, settings, books)
        self._usage = app[CONTEXT].usage
        self._runner = make_runner(app, SHUTDOWN_TIMEOUT_S)

    # --- Executor ---

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._chores = [
            asyncio.create_task(chore) for chore in (self._routes.watch(), self._let_shadows_go())
        ]
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
            case DeliverAdapter(changed):
                change = self._changes.get(changed.call_id)
                if change is not None and not change.done():
                    change.set_result(changed)
            case _:
                raise AssertionError(f"not for a frontend: {type(effect).__name__}")

    async def close(self) -> None:
        """After the machine's last word: sends what is written, then closes every connection."""
        for chore in self._chores:
            chore.cancel()
        await self._runner.cleanup()
        if self._books.journal is not None:
            await self._books.journal.close()
        if self._books.audit is not None:
            await asyncio.to_thread(self._books.audit.close)

    async def _let_shadows_go(self) -> None:
        """Nobody waits for them, so a drain does not."""
        while not self._machine.draining:  # noqa: ASYNC110 (machines tell nobody of a drain)
            await asyncio.sleep(DRAIN_SEEN_S)
        self._shadows.close()

    # --- Gateway ---

    def status(self, name: str = "", key: str = "") -> ClusterStatus:
        machine, membership = self._machine, self._machine.membership
        now_s = time.monotonic()
        known = self._models.look(membership.taking_part(), now_s)
        ready = [model for model in known if not machine.patience.missing(now_s, model)]
        adapters = self._adapters(known)
        ready += [other for other, (model, _) in adapters.items() if model in ready]
        target = self._routes.now.target(name, key, ready, {*known, *adapters}) if name else ""
        asked, adapter = adapters.get(target, (target if target in known else "", None))
        shown = asked or ("" if name else next(iter(known), ""))
        model = known.get(shown, Known())
        reason = machine.patience.missing(now_s, asked)
        return ClusterStatus(
            ready=not reason,
            draining=machine.draining,
            reason=reason,
            refuses=machine.patience.over(now_s, asked),
            model=shown,
            name=target if asked else shown,
            adapter=adapter.adapter_id if adapter else "",
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            sampling=model.sampling,
            models=self._cards(known, adapters, now_s),
            nodes=list(membership.nodes.values()),
            retry_after_s=machine.settings.retry_after_s,
            running=self._summed("running"),
            waiting=self._summed("waiting"),
        )

    def _adapters(self, known: Mapping[str, Known]) -> dict[str, tuple[str, AdapterInfo]]:
        """Name -> model and version."""
        models = self._machine.membership.models.values()
        return {
            adapter.name: (model.name, adapter)
            for model in models
            if model.name in known
            for adapter in model.adapters
            if adapter.name not in known  # a model has its name for itself
        }

    def _cards(
        self,
        known: Mapping[str, Known],
        adapters: Mapping[str, tuple[str, AdapterInfo]],
        now_s: float,
    ) -> list[ModelCard]:
        """The models, their adapters, then the other names of those that are there."""
        cards = {
            name: ModelCard(
                name=name,
                max_model_len=model.max_model_len,
                root=name,
                reason=self._machine.patience.missing(now_s, name),
            )
            for name, model in known.items()
        }
        for name, (model, adapter) in adapters.items():
            like = cards[model]
            cards[name] = msgspec.structs.replace(like, name=name, root=adapter.path, parent=model)
        for alias, weights in self._routes.now.alias.items():
            there = [cards[name] for name in weights if name in cards]
            if alias not in cards and there:
                first = max(there, key=lambda card: weights[card.name])
                cards[alias] = ModelCard(
                    name=alias,
                    max_model_len=min(card.max_model_len for card in there),
                    root=first.name,
                    reason=first.reason if all(card.reason for card in there) else "",
                )
        return list(cards.values())

    def open(
        self,
        submission: Tokenize,
        put: Callable[[StreamItem], None],
        context: TraceContext,
        model: str,
        taken: Taken | None = None,
    ) -> Callable[[], None]:
        if taken is None and (to := self._routes.now.copied(model, context.trace_id)):
            inner = partial(self._open, context=context, model=to, taken=None)
            self._shadows.copy(submission, to, self.status(to), inner)
        return self._open(submission, put, context, model, taken)

    def _open(
        self,
        submission: Tokenize,
        put: Callable[[StreamItem], None],
        context: TraceContext,
        model: str,
        taken: Taken | None,
    ) -> Callable[[], None]:
        request_id = submission.request_id
        metrics = self._requests.setdefault(submission.model, RequestMetrics())
        watched = metrics.watch(submission, put, self._models.max_model_len(submission.model))
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

    async def codec(self, prompt: Prompt | None, tokens: bytes, model: str) -> DeliverCodec:
        call_id = uuid.uuid4().hex
        future: asyncio.Future[DeliverCodec] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        self._post(CodecAsked(call_id, prompt, tokens, model))
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

    async def adapter(self, model: str, name: str, path: str, replace: bool) -> Problem | None:
        call_id = uuid.uuid4().hex
        future: asyncio.Future[AdapterChanged] = asyncio.get_running_loop().create_future()
        self._changes[call_id] = future
        change = ChangeAdapter(call_id=call_id, model=model, name=name, path=path, replace=replace)
        self._post(AdapterAsked(change))
        try:
            return (await asyncio.wait_for(future, ADAPTER_TIMEOUT_S)).problem
        except TimeoutError:
            return Problem(
                code=ErrorCode.NOT_READY,
                message="The scheduler does not say what became of it; see GET /v1/models.",
                retry_after_s=1.0,
            )
        finally:
            del self._changes[call_id]

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
        membership = self._machine.membership
        yield from self._cluster.nodes(load, membership.nodes)
        yield from self._shadows.families()
        yield from merged(self._of_models(status.models))

    def _of_models(self, cards: Sequence[ModelCard]) -> Iterator[Metric]:
        """The same families for each of them; of those that were asked for, but are gone, too."""
        membership, said = self._machine.membership, self._machine.load
        names = [card.name for card in cards if card.root == card.name]
        for model in dict.fromkeys([*names, *self._requests]):
            labels = {"model_name": model}
            workers = {
                node_id: gauges
                for node_id, gauges in said.gauges.items()
                if node_id in membership.nodes and membership.nodes[node_id].model == model
            }
            requests = said.requests.get(model, {})
            yield from self._cluster.cluster(workers, requests, labels)
            if (state := membership.models.get(model)) is not None:
                loaded = [adapter.name for adapter in state.adapters]
                yield from self._cluster.adapters(loaded, time.time(), labels)
            yield from self._requests.get(model, RequestMetrics()).families(labels)

    def _summed(self, name: str) -> int:
        return int(sum(gauges.get(name, 0) for gauges in self._machine.load.gauges.values()))
