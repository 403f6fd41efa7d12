"""One request, seen in all services: by `slipstream trace`, and by an OTLP collector."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from e2e.client import MODEL, Client, eventually
from e2e.stack import PATIENCE_S, Stack

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = list(range(7000, 7600))
ROLES = {"frontend", "tokenizer", "scheduler", "kvindex", "prefill", "decode"}


async def trace_of(stack: Stack, name: str) -> dict[str, Any]:
    """As soon as all have told of it."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
        while True:
            async with session.get(f"{stack.url}/trace/{name}") as reply:
                if reply.status == 200:
                    (trace,) = (await reply.json())["traces"]
                    over = all(span["duration_ms"] is not None for span in trace["spans"])
                    if over and {span["role"] for span in trace["spans"]} == ROLES:
                        return dict(trace)
            await asyncio.sleep(0.05)


def first(trace: dict[str, Any], role: str, name: str) -> tuple[float, float]:
    """When a span began and ended, in ms."""
    span = next(s for s in trace["spans"] if (s["role"], s["name"]) == (role, name))
    return span["begin_ms"], span["begin_ms"] + span["duration_ms"]


async def test_a_request_in_all_six_services(stack: Stack, client: Client) -> None:
    answer = await client.complete(PROMPT, max_tokens=8, ignore_eos=True)
    trace = await trace_of(stack, answer.id)
    assert trace["request_id"] == f"{answer.id}-0"
    steps = [
        ("frontend", "request"),
        ("tokenizer", "encode"),
        ("scheduler", "schedule"),
        ("kvindex", "look up"),
        ("prefill", "prefill"),
        ("prefill", "chunk"),
        ("decode", "hand-over"),
        ("decode", "generate"),
    ]
    begins = [first(trace, *step)[0] for step in steps]
    assert begins == sorted(begins), dict(zip(steps, begins, strict=True))
    whole = first(trace, "frontend", "request")
    for span in trace["spans"]:
        # What a worker has still to do after its last token, it does while the client reads.
        assert whole[0] <= span["begin_ms"] <= whole[1], span
    chunks = [s for s in trace["spans"] if (s["role"], s["name"]) == ("prefill", "chunk")]
    assert sum(chunk["attributes"]["tokens"] for chunk in chunks) == len(PROMPT)
    (hand_over,) = [s for s in trace["spans"] if s["name"] == "hand-over"]
    said = hand_over["attributes"]
    blocks = -(-len(PROMPT) // 16)
    assert (said["transport"], said["verified"], said["blocks"]) == ("shm", True, blocks)
    assert said["bytes"] % blocks == 0 and said["peer"] == "prefill-0"
    assert trace["decision"]["decode"] == "decode-0" and trace["decision"]["actual_ttft_s"] > 0


async def test_the_command(stack: Stack, client: Client) -> None:
    """By the id of the answer, and by the header; as soon as the answer is there."""
    answer = await client.complete(PROMPT, max_tokens=4)
    headers = {name.lower(): value for name, value in answer.headers.items()}
    for name in (answer.id, headers["x-request-id"]):
        shown = await asyncio.to_thread(_command, name, "--url", stack.url)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"{answer.id}-0 ")
        for role in ROLES - {"scheduler"}:
            assert f"\n{role}-0 " in shown.stdout, shown.stdout
    unknown = await asyncio.to_thread(_command, "nobody", "--url", stack.url)
    assert unknown.returncode == 3 and unknown.stderr.count("\n") == 1
    assert "those of the last" in unknown.stderr


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slipstream.cli.main", "trace", *words],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


# --- A collector ----------------------------------------------------------------------------------


class Collector:
    def __init__(self) -> None:
        self.hangs = False
        self.asked = 0
        self.spans: dict[bytes, tuple[str, str, Any]] = {}
        """By id: service, node, span."""

    async def take(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = ExportTraceServiceRequest.FromString(await request.read())
        while self.hangs:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        for resource in body.resource_spans:
            said = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    assert span.span_id not in self.spans, "each once"
                    names = said["service.name"], said["service.instance.id"]
                    self.spans[span.span_id] = (*names, span)
        return web.Response()

    def of(self, trace_id: str) -> list[tuple[str, str, Any]]:
        return [one for one in self.spans.values() if one[2].trace_id.hex() == trace_id]


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
        collector.hangs = False
        await runner.cleanup()


async def ask(stack: Stack, traceparent: str) -> int:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    headers = {"traceparent": traceparent, "tracestate": "vendor=1"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{stack.url}/v1/completions", json=body, headers=headers) as reply,
    ):
        await reply.read()
        return reply.status


@pytest.mark.timeout(300)
async def test_a_collector_gets_what_its_clients_sample() -> None:
    collector = Collector()
    async with collecting(collector) as url:
        stack = await asyncio.to_thread(
            Stack, otlp_endpoint=url, kv_cache_bytes="96MiB", locate_timeout_s=5.0
        )
        try:
            assert await ask(stack, f"00-{'1' * 32}-{PARENT}-00") == 200
            assert await ask(stack, f"00-{TRACE}-{PARENT}-01") == 200
            services = {f"slipstream-{role}" for role in ROLES}
            await eventually(lambda: {service for service, _, _ in collector.of(TRACE)} == services)
            spans = collector.of(TRACE)
            (root,) = [span for _, _, span in spans if span.kind == span.SPAN_KIND_SERVER]
            assert root.parent_span_id.hex() == PARENT and root.name == f"text_completion {MODEL}"
            for _, _, span in spans:
                known = span.parent_span_id in collector.spans or span is root
                assert known and span.trace_state == "vendor=1", span
            for service, name in (("decode", "hand-over"), ("prefill", "chunk")):
                (span, *_) = [s for one, _, s in spans if s.name == name and one.endswith(service)]
                above = collector.spans[span.parent_span_id]
                assert above[0] == f"slipstream-{service}" and above[2].name == service
                assert collector.spans[above[2].parent_span_id][2] is root
            assert not collector.of("1" * 32), "not sampled"
            await _hanging_does_no_harm(stack, collector)
            stack.close()
        finally:
            stack.kill()


async def _hanging_does_no_harm(stack: Stack, collector: Collector) -> None:
    collector.hangs, before = True, collector.asked
    assert await ask(stack, f"00-{'2' * 32}-{PARENT}-01") == 200
    await eventually(lambda: collector.asked > before)
    for _ in range(5):
        assert await ask(stack, f"00-{'3' * 32}-{PARENT}-01") == 200
