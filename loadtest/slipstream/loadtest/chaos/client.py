"""A client that keeps all that it is told. What nobody has begun it sends again, elsewhere."""

import asyncio
import json
import time
from itertools import count
from typing import Any

import aiohttp

from slipstream.loadtest.chaos.asks import Ask
from slipstream.loadtest.chaos.history import REFUSALS, Choice, Entry

REFUSED_MAX_S = 30.0
RETRY_S = 0.1
GRACE_S = 20.0
"""After the time budget: then the client goes, and the request has no end."""


class Client:
    """For the frontends of one stack."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.entries: list[Entry] = []
        self._turn = count()
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def close(self) -> None:
        await self._session.close()

    async def post(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one answer of the first frontend; nothing of it is kept."""
        async with self._session.post(self.urls[0] + path, json=body) as reply:
            return reply.status, await reply.json()

    def send(
        self, ask: Ask, headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[Entry, "asyncio.Task[None]"]:
        """The entry as far as it is filled, and the task that fills it; cancelled, the client has
        left. `more` goes into the body."""
        body = {**ask.body, **more}
        entry = Entry(ask=ask.name, timeout_s=body["timeout"], sent_s=time.monotonic())
        self.entries.append(entry)
        return entry, asyncio.create_task(self._follow(entry, ask, body, headers or {}))

    async def _follow(
        self, entry: Entry, ask: Ask, body: dict[str, Any], headers: dict[str, str]
    ) -> None:
        try:
            async with asyncio.timeout(entry.timeout_s + GRACE_S + REFUSED_MAX_S):
                await self._until_taken(entry, ask, body, headers)
        except TimeoutError:
            pass  # it has no end; the checker says so
        except asyncio.CancelledError:
            entry.left = True
            raise
        finally:
            entry.end_s = time.monotonic()

    async def _until_taken(
        self, entry: Entry, ask: Ask, body: dict[str, Any], headers: dict[str, str]
    ) -> None:
        give_up_s = entry.sent_s + REFUSED_MAX_S
        while True:
            entry.sent_s = time.monotonic()
            entry.code, entry.broken, entry.done = "", "", False
            url = self.urls[next(self._turn) % len(self.urls)]
            try:
                async with self._session.post(url + ask.path, json=body, headers=headers) as reply:
                    await self._read(entry, ask, reply)
            except (aiohttp.ClientError, OSError) as error:
                entry.broken = f"{type(error).__name__}: {error}"
            begun = bool(entry.choices) or (entry.status and entry.code not in REFUSALS)
            if begun or time.monotonic() > give_up_s or not (entry.code or entry.broken):
                return
            entry.refused += 1
            entry.status = 0
            await asyncio.sleep(RETRY_S)

    async def _read(self, entry: Entry, ask: Ask, reply: aiohttp.ClientResponse) -> None:
        entry.path = reply.headers.get("x-slipstream-path", "")
        entry.status = reply.status
        if reply.status == 200 and ask.streamed:
            await self._events(entry, reply)
        else:
            _take(entry, await reply.json(), streamed=False)
            entry.done = True

    async def _events(self, entry: Entry, reply: aiohttp.ClientResponse) -> None:
        async for line in reply.content:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                entry.done = True
                return
            if data.startswith(b"{"):
                _take(entry, json.loads(data), streamed=True)
        entry.broken = entry.broken or "no [DONE]"


def _take(entry: Entry, said: dict[str, Any], streamed: bool) -> None:
    entry.code = (said.get("error") or {}).get("code", entry.code)
    entry.answer_id = said.get("id", entry.answer_id)
    usage = said.get("usage") or {}
    entry.prompt_tokens = usage.get("prompt_tokens", entry.prompt_tokens)
    entry.completion_tokens = usage.get("completion_tokens", entry.completion_tokens)
    choices = said.get("choices", ())
    if streamed and choices:
        entry.times_s.append(time.monotonic())
    for choice in choices:
        known = entry.choices.setdefault(choice["index"], Choice())
        message = choice.get("delta" if streamed else "message") or choice
        known.text += message.get("text") or message.get("content") or ""
        known.finish_reason = choice["finish_reason"] or known.finish_reason
        told = choice.get("logprobs") or {}
        known.logprobs += told.get("token_logprobs") or ()
