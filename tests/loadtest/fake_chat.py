"""A server of chats and completions with room for a few answers at a time, which refuses what is
more, and answers some requests badly on demand."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from aiohttp import web

MODEL = "fake"


@dataclass
class Fake:
    room: int = 4
    token_s: float = 0.002
    fault: str = ""
    """What goes wrong with every `each`th accepted request, of those from the fifth on."""
    each: int = 3
    retry_after: str = "1"
    url: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    nine: asyncio.Event = field(default_factory=asyncio.Event)
    """So many requests have been accepted."""

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._answer),
                web.post("/v1/completions", self._answer),
                web.get("/v1/models", self._models),
            ]
        )
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["model"] == MODEL and body["stream"] and body["temperature"] == 0
        self.seen["asked"] += 1
        if self.busy >= self.room:
            self.seen["refused"] += 1
            headers = {"Retry-After": self.retry_after} if self.retry_after else {}
            return web.json_response({"error": {}}, status=429, headers=headers)
        self.seen["accepted"] += 1
        self.bodies.append(body)
        if len(self.bodies) == 9:
            self.nine.set()
        accepted = self.seen["accepted"]
        bad = bool(self.fault) and accepted > 4 and accepted % self.each == 0
        self.seen["bad"] += bad
        if bad and self.fault == "500":
            return web.json_response({"error": {"message": "out of order"}}, status=500)
        self.busy += 1
        try:
            return await self._stream(request, body, self.fault if bad else "")
        finally:
            self.busy -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], fault: str
    ) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        wanted = body["max_tokens"] - (fault == "short")
        asked = json.dumps(body.get("messages") or body["prompt"])
        said = f"{blake2b(asked.encode()).hexdigest()}{accepted_text(fault, self.seen)}"
        chat = "messages" in body
        for index in range(wanted):
            if fault == "late":
                await asyncio.sleep(0.5 * (index == 0))
            await asyncio.sleep(self.token_s)
            text = said[-1 - index % len(said)]
            piece = {"delta": {"content": text}} if chat else {"text": text}
            await reply.write(_event({"choices": [{"index": 0, **piece}]}))
            if index == 1 and fault == "cut":
                assert request.transport is not None
                request.transport.close()
                return reply
            if index == 1 and fault == "error":
                await reply.write(_event({"error": {"message": "lost it"}}))
                return reply
            if index == 1 and fault == "silent":
                await asyncio.sleep(60)
        if fault != "unfinished":
            end = {"index": 0, "finish_reason": "length", **({"delta": {}} if chat else {})}
            await reply.write(_event({"choices": [end]}))
        prompt_tokens = len(asked.split())
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": wanted,
            "prompt_tokens_details": {"cached_tokens": prompt_tokens // 2},
        }
        await reply.write(_event({"choices": [], "usage": usage}))
        await reply.write(b"data: [DONE]\n\n")
        return reply


def accepted_text(fault: str, seen: Counter[str]) -> str:
    """What makes an answer another one than that to the same prompt before."""
    return str(seen["accepted"]) if fault == "different" else ""


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
