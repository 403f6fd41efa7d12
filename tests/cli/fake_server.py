"""An OpenAI server with Slipstream's /cluster and /metrics, and with faults, in a thread."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aiohttp import web

MODEL = "fake-1b"
CONTEXT = 64


class FakeServer:
    """Tests change its attributes while it runs."""

    def __init__(self) -> None:
        self.words = ["Hello", " there", "."]
        self.thoughts: list[str] = []
        """Before the words, in a chat."""
        self.pause_s = 0.0
        """Before each word."""
        self.fault = ""
        """refused, overflow, cut, unfinished, error, no_usage, silent: from now on."""
        self.refusals = 0
        """So many more requests get 429 first."""
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.tokens_total = 0
        self.looks = 0
        self.broken_off = 0
        """Answers that the client did not wait for."""
        self.url = ""

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._answer),
                web.post("/v1/completions", self._answer),
                web.get("/cluster", self._cluster),
                web.get("/metrics", self._metrics),
                web.get("/readyz", self._ready),
            ]
        )
        return app

    async def _models(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization", ""))
        return web.json_response({"data": [{"id": MODEL, "max_model_len": CONTEXT}]})

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ready", "model": MODEL, "nodes": []})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if self.refusals:
            self.refusals -= 1
            error = {"message": "Too many requests wait.", "code": "queue_full"}
            return web.json_response({"error": error}, status=429, headers={"Retry-After": "1"})
        if self.fault == "refused":
            return web.json_response({"error": {"message": "out of order"}}, status=500)
        if self.fault == "overflow":
            text = f"This model's maximum context length is {CONTEXT} tokens."
            error = {"message": text, "code": "context_length_exceeded"}
            return web.json_response({"error": error}, status=400)
        reply = web.StreamResponse(headers={"x-slipstream-path": "prefill-0>decode-0"})
        reply.content_type = "text/event-stream"
        await reply.prepare(request)
        try:
            await self._stream(reply, body)
        except (ConnectionError, asyncio.CancelledError):
            self.broken_off += 1
            raise
        if self.fault == "cut":
            assert request.transport is not None
            request.transport.close()
        return reply

    async def _stream(self, reply: web.StreamResponse, body: dict[str, Any]) -> None:
        async def say(chunk: dict[str, Any]) -> None:
            await reply.write(b"data: " + json.dumps({"id": "a1", **chunk}).encode() + b"\n\n")

        chat = "messages" in body
        if chat:
            await say({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for thought in self.thoughts if chat else ():
            await say({"choices": [{"delta": {"reasoning_content": thought}}]})
        for word in self.words:
            await asyncio.sleep(self.pause_s)
            await say({"choices": [{"delta": {"content": word}} if chat else {"text": word}]})
            self.tokens_total += 1
        if self.fault in ("cut", "unfinished"):
            return
        if self.fault == "error":
            await say({"error": {"message": "lost it"}})
        last = {"delta": {}} if chat else {"text": ""}
        await say({"choices": [{**last, "finish_reason": "stop"}]})
        asked = json.dumps(body.get("messages", body.get("prompt")))
        usage = {
            "prompt_tokens": len(asked.split()),
            "completion_tokens": len(self.words + self.thoughts),
        }
        usage["prompt_tokens_details"] = {"cached_tokens": 2}
        if self.fault != "no_usage":
            await say({"choices": [], "usage": usage})
        await reply.write(b"data: [DONE]\n\n")

    async def _cluster(self, request: web.Request) -> web.Response:
        self.looks += 1
        if self.fault == "silent":
            return web.Response(status=503, text="no")
        return web.json_response(cluster(self.looks))

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=metrics(self.looks))


def cluster(looks: int) -> dict[str, Any]:
    """Of two workers; counters grow from look to look."""
    load = {
        "running": 3,
        "waiting": 1,
        "waiting_tokens": 20,
        "steps_total": 100 * looks,
        "step_seconds_total": 1.5 * looks,
        "blocks": {"free": 20, "used": 70, "cached": 60, "leased": 10},
        "blocks_from": {"prefill-0": 7 * looks},
        "transports": {},
        "prefix_hit_tokens_total": 30 * looks,
        "prefix_query_tokens_total": 40 * looks,
        "preemptions_total": 0,
    }
    worker = {
        "role": "decode",
        "model": MODEL,
        "epoch": "17",
        "host": "h",
        "device": "cpu",
        "draining": False,
        "computes_prompts": True,
        "accepts_streams": True,
        "shifted": False,
        "num_blocks": 100,
        "block_bytes": 1024,
    }
    return {
        "ready": True,
        "draining": False,
        "reason": "",
        "model": MODEL,
        "max_model_len": CONTEXT,
        "models": [{"name": MODEL, "max_model_len": CONTEXT, "parent": None, "reason": ""}],
        "workers": [
            {**worker, "node_id": "decode-0", "load": load},
            {
                **worker,
                "node_id": "prefill-0-of-a-long-name",
                "accepts_streams": False,
                "load": None,
            },
        ],
        "services": [
            {"node_id": "frontend-0", "role": "frontend", "draining": False},
            {"node_id": "tokenizer-0", "role": "tokenizer", "draining": True},
        ],
        "requests": {
            "states": {"queued": 2, "prefilling": 0, "decoding": 3},
            "accepted_total": 10 * looks,
            "ended_total": 9 * looks,
            "migrated_total": 0,
            "placed_total": {},
            "role_shifts_total": 0,
            "ttft_prediction_error_median": 0.0,
        },
        "frontend": {"node_id": "frontend-0", "requests_live": 5, "tokens_total": 50 * looks},
    }


def metrics(looks: int, frontend: str = "frontend-0") -> str:
    label = '{model_name="fake-1b",le='
    ttft, itl = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
    lines = [f"# TYPE {ttft} histogram"]
    lines += [f'{ttft}_bucket{label}"{le}"}} {n * looks}' for le, n in TTFT_BUCKETS.items()]
    lines += [f'{ttft}_sum{{model_name="fake-1b"}} 1', f"# TYPE {itl} histogram"]
    lines += [f'{itl}_bucket{label}"{le}"}} {n * looks}' for le, n in TTFT_BUCKETS.items()]
    names = {"tokens": 40 * looks, "prompt_tokens": 400 * looks}
    for name, value in names.items():
        family = f"slipstream_worker_{name}_total"
        lines.append(f"# TYPE {family} counter")
        lines.append(f'{family}{{model_name="fake-1b",node_id="decode-0",role="decode"}} {value}')
    worker = '{model_name="fake-1b",node_id="decode-0",role="decode"}'
    lines.append(f"slipstream_worker_blocks_referenced{worker} 50")
    lines.append(f'slipstream_requests_live{{node_id="{frontend}",role="frontend"}} 5')
    lines.append("# TYPE slipstream_http_responses_total counter")
    lines.append(f'slipstream_http_responses_total{{code="200"}} {10 * looks}')
    lines.append(f'slipstream_http_responses_total{{code="429"}} {4 * looks}')
    lines.append(f'slipstream_http_responses_total{{code="500"}} {2 * looks}')
    return "\n".join(lines) + "\n"


TTFT_BUCKETS = {"0.1": 10, "0.2": 20, "0.4": 20, "+Inf": 20}


F = TypeVar("F", bound=FakeServer)


@contextmanager
def running(fake: F) -> Iterator[F]:
    """In a loop of its own, so that tests can call the command as a user does."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        runner = web.AppRunner(fake.application(), handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        over = asyncio.Event()
        fake.end = lambda: loop.call_soon_threadsafe(over.set)  # type: ignore[attr-defined]
        ready.set()
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        fake.end()  # type: ignore[attr-defined]
        thread.join(10)
        loop.close()
