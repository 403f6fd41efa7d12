"""Spans on their way to a collector: what they say, and what becomes of those it does not take."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from slipstream.cli.main import main
from slipstream.core.machine import Counted, Event, ExportTrace
from slipstream.scheduler import exporter
from slipstream.scheduler.config import SchedulerConfig
from slipstream.scheduler.exporter import OtlpExporter
from slipstream.scheduler.otlp import encode, load_proto
from slipstream.spans import ProcessSpans, Span, Trace, TraceContext
from slipstream.types import Role

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def trace(request_id: str = "cmpl-x-0", **context: Any) -> Trace:
    said = {"trace_id": TRACE_ID, "parent_id": PARENT_ID, "state": "a=1", **context}
    root = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "demo",
        "gen_ai.response.finish_reasons": "stop",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.request.temperature": 0.5,
    }
    return Trace(
        request_id=request_id,
        context=TraceContext(**said),
        processes=[
            ProcessSpans(
                node_id="frontend-0",
                role=Role.FRONTEND,
                epoch=3,
                spans=[
                    Span(number=8, name="request", begin_ns=10, end_ns=90, attributes=root),
                    Span(number=9, name="stream", begin_ns=50, end_ns=90),
                ],
            ),
            ProcessSpans(
                node_id="decode-0",
                role=Role.DECODE,
                epoch=4,
                spans=[
                    Span(
                        number=8, name="decode", begin_ns=20, end_ns=80, attributes={"attempt": 1}
                    ),
                    Span(
                        number=9,
                        name="hand-over",
                        begin_ns=20,
                        end_ns=40,
                        parent=8,
                        attributes={"verified": False, "error.type": "digest"},
                    ),
                ],
            ),
        ],
    )


def said(attributes: Any) -> dict[str, Any]:
    found = {}
    for entry in attributes:
        kind = entry.value.WhichOneof("value")
        value = getattr(entry.value, kind)
        found[entry.key] = (
            [v.string_value for v in value.values] if kind == "array_value" else value
        )
    return found


def spans_of(request: Any) -> dict[tuple[str, str], Any]:
    """(node id, name) -> span."""
    return {
        (said(resource.resource.attributes)["service.instance.id"], span.name): span
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }


def test_what_a_collector_reads() -> None:
    request = ExportTraceServiceRequest.FromString(encode(load_proto(), [trace()]))
    resources = [said(resource.resource.attributes) for resource in request.resource_spans]
    assert [r["service.name"] for r in resources] == ["slipstream-frontend", "slipstream-decode"]
    assert [r["service.instance.id"] for r in resources] == ["frontend-0", "decode-0"]
    spans = spans_of(request)
    root = spans["frontend-0", "chat demo"]
    assert root.parent_span_id.hex() == PARENT_ID and root.kind == root.SPAN_KIND_SERVER
    assert spans["frontend-0", "stream"].parent_span_id == root.span_id
    assert spans["decode-0", "decode"].parent_span_id == root.span_id
    hand_over = spans["decode-0", "hand-over"]
    assert hand_over.parent_span_id == spans["decode-0", "decode"].span_id
    assert len({span.span_id for span in spans.values()}) == 4
    assert all(span.trace_id.hex() == TRACE_ID for span in spans.values())
    assert all(span.trace_state == "a=1" for span in spans.values())
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (10, 90)
    assert said(root.attributes) == {
        "slipstream.request_id": "cmpl-x-0",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "demo",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.request.temperature": 0.5,
    }
    assert said(hand_over.attributes)["slipstream.verified"] is False
    assert hand_over.status.code == hand_over.status.STATUS_CODE_ERROR
    assert hand_over.status.message == "digest" and not root.status.code


def test_a_trace_of_ours_has_no_parent_and_ids_stay() -> None:
    """Late spans of a request go out in another message."""
    one, other = (
        spans_of(ExportTraceServiceRequest.FromString(encode(load_proto(), [said_of])))
        for said_of in (trace(parent_id=""), trace(parent_id=""))
    )
    assert not one["frontend-0", "chat demo"].parent_span_id
    assert {k: s.span_id for k, s in one.items()} == {k: s.span_id for k, s in other.items()}


# --- The exporter ---------------------------------------------------------------------------------


class Collector:
    """Answers as it is told to."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        """Statuses to come; then 200."""
        self.requests: list[Any] = []
        self.hangs = False

    async def take(self, request: web.Request) -> web.Response:
        assert request.headers["Content-Type"] == "application/x-protobuf"
        if self.hangs:
            await asyncio.sleep(60)
        status = self.answers.pop(0) if self.answers else 200
        if status == 200:
            self.requests.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(status=status)

    @property
    def spans(self) -> int:
        return sum(len(spans_of(request)) for request in self.requests)


@asynccontextmanager
async def collecting(collector: Collector) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def exporting(url: str) -> AsyncIterator[tuple[OtlpExporter, dict[str, float]]]:
    """With what it has counted as of late."""
    counted: dict[str, float] = {}

    def post(event: Event) -> None:
        assert isinstance(event, Counted)
        counted.update(event.values)

    executor = OtlpExporter(url)
    await executor.start(post)
    try:
        yield executor, counted
    finally:
        await executor.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GATHER_S", "RETRY_FIRST_S", "RETRY_MAX_S"):
        monkeypatch.setattr(exporter, name, 0.02)


async def test_traces_go_together() -> None:
    collector = Collector()
    async with collecting(collector) as url, exporting(url + "/") as (executor, counted):
        assert counted == {"otlp_spans_sent_total": 0, "otlp_spans_dropped_total": 0}
        for number in range(3):
            executor.execute(ExportTrace(trace(f"r{number}")))
        await until(lambda: counted["otlp_spans_sent_total"] == 12)
    assert len(collector.requests) == 1 and counted["otlp_spans_dropped_total"] == 0


async def test_a_collector_that_is_busy_is_asked_again() -> None:
    collector = Collector()
    collector.answers = [503, 429]
    async with collecting(collector) as url, exporting(url) as (executor, counted):
        executor.execute(ExportTrace(trace()))
        await until(lambda: counted["otlp_spans_sent_total"] == 4)
    assert len(collector.requests) == 1


@pytest.mark.parametrize("answers", [[400], [503] * exporter.TRIES])
async def test_what_it_refuses_is_dropped_and_the_next_goes(answers: list[int]) -> None:
    collector = Collector()
    collector.answers = list(answers)
    async with collecting(collector) as url, exporting(url) as (executor, counted):
        executor.execute(ExportTrace(trace("one")))
        await until(lambda: counted["otlp_spans_dropped_total"] == 4)
        executor.execute(ExportTrace(trace("two")))
        await until(lambda: counted["otlp_spans_sent_total"] == 4)


async def test_one_that_hangs_costs_a_bounded_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "QUEUE_SPANS_MAX", 40)
    monkeypatch.setattr(exporter, "BATCH_SPANS", 4)
    monkeypatch.setattr(exporter, "LAST_POST_S", 0.05)
    collector = Collector()
    collector.hangs = True
    async with collecting(collector) as url, exporting(url) as (executor, counted):
        executor.execute(ExportTrace(trace("first")))
        await asyncio.sleep(0.1)
        for number in range(100):
            executor.execute(ExportTrace(trace(f"r{number}")))
        assert counted["otlp_spans_dropped_total"] == 4 * 90
    assert not collector.requests


async def test_one_that_is_not_there() -> None:
    async with exporting("http://127.0.0.1:9") as (executor, counted):
        executor.execute(ExportTrace(trace()))
        await until(lambda: counted["otlp_spans_dropped_total"] == 4)


async def test_the_rest_goes_out_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "GATHER_S", 60.0)
    collector = Collector()
    async with collecting(collector) as url:
        async with exporting(url) as (executor, _):
            executor.execute(ExportTrace(trace()))
        assert collector.spans == 4


# --- Its setting ----------------------------------------------------------------------------------


def test_without_the_package_the_scheduler_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.trace.v1", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.collector.trace.v1", None)
    line = ["scheduler", "--run-dir", str(tmp_path), "--otlp-endpoint", "http://localhost:4318"]
    assert main(line) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "install 'slipstream[otel]'" in error


@pytest.mark.parametrize(
    "url", ["localhost:4318", "ftp://x", "http://", "http://u:p@host:1", "http://h:1?key=s"]
)
def test_what_is_no_endpoint(url: str) -> None:
    with pytest.raises(ValueError, match="--otlp-endpoint"):
        SchedulerConfig(otlp_endpoint=url)
