"""A server that answers as an OpenAI server does, with faults: in a test's own loop, or as a
program, `python fake_openai.py PORT`."""

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

MODEL = "fake"
REFUSED, BROKEN_OFF, SAYS_ERROR, TOO_SHORT, NONSENSE = range(1, 6)
"""First token of a prompt: what goes wrong with its answer. Any other: nothing."""
TOKENS_IN_A_CHUNK = 3


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def _complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    assert body["stream"] and body["ignore_eos"] and body["temperature"] == 0
    assert body["stream_options"] == {"include_usage": True}
    fault, wanted = body["prompt"][0], body["max_tokens"]
    if fault == REFUSED:
        return web.json_response({"error": {"message": "out of order"}}, status=500)
    reply = web.StreamResponse()
    reply.content_type = "text/event-stream"
    await reply.prepare(request)
    await reply.write(b": a comment\n\n")
    tokens = wanted - 1 if fault == TOO_SHORT else wanted
    for _ in range(0, tokens, TOKENS_IN_A_CHUNK):
        event = _event({"choices": [{"index": 0, "text": "abc"}]})
        await reply.write(event[:9])  # a chunk of HTTP ends where it likes
        await asyncio.sleep(0.001)
        await reply.write(event[9:])
        if fault == BROKEN_OFF:
            assert request.transport is not None
            request.transport.close()
            return reply
        if fault == SAYS_ERROR:
            await reply.write(_event({"error": {"message": "lost it"}}))
        if fault == NONSENSE:
            await reply.write(b"data: {nonsense\n\n")
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
    await reply.write(_event({"choices": [], "usage": usage}))
    await reply.write(b"data: [DONE]\n\n")
    return reply


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": MODEL}]})


async def _health(request: web.Request) -> web.Response:
    return web.Response()


def application() -> web.Application:
    app = web.Application()
    app.add_routes(
        [
            web.post("/v1/completions", _complete),
            web.get("/v1/models", _models),
            web.get("/health", _health),
        ]
    )
    return app


if __name__ == "__main__":
    web.run_app(application(), host="127.0.0.1", port=int(sys.argv[1]), print=None)
