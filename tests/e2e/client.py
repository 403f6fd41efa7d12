"""A client that keeps everything it is told: what was streamed so far, ids, usage, errors."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import aiohttp

from e2e.stack import PATIENCE_S

Prompt: TypeAlias = str | list[int]
MODEL = "smollm2-135m-instruct"
TIMEOUT_S = 90.0
"""Time budget of a request. An answer, of whatever kind, comes before it or shortly after."""


async def eventually(condition: Callable[[], bool]) -> None:
    """`until`, for what fills up on this loop; looks often, so that little happens meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (an event would have to be set in each place)
            await asyncio.sleep(0.005)


@dataclass(eq=False)
class Answer:
    """One answer of /v1/completions. It fills up while it is streamed."""

    id: str = ""
    text: str = ""
    chunks: int = 0
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    broken: str = ""
    """How the connection ended, if not with the answer's end."""

    @property
    def cached_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


class Client:
    """For one stack. Sends no request a second time, whatever becomes of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=self._connector)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def post(self, path: str, body: Any) -> Answer:
        """Whatever comes back; `body`: to be encoded, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self.url + path, data=data, headers=headers) as reply:
            answer = Answer(status=reply.status, headers=dict(reply.headers))
            said = await reply.json()
            answer.error = said.get("error", {})
            return answer

    async def complete(self, prompt: Prompt, **body: Any) -> Answer:
        """Greedy unless `body` says otherwise; not streamed. An error is a failure."""
        answer = Answer()
        await asyncio.wait_for(self._complete(prompt, body, answer), TIMEOUT_S + PATIENCE_S)
        assert answer.status == 200, answer.error
        return answer

    def stream(self, prompt: Prompt, **body: Any) -> tuple[Answer, "asyncio.Task[None]"]:
        """The answer as far as it is there, and the task that fills it. The task fails only if
        nothing at all ends the stream within its time budget."""
        answer = Answer()
        following = self._complete(prompt, {**body, "stream": True}, answer)
        # The frontend's own limit lies 5 s behind the request's budget.
        return answer, asyncio.create_task(asyncio.wait_for(following, TIMEOUT_S + 15.0))

    async def _complete(self, prompt: Prompt, body: dict[str, Any], answer: Answer) -> None:
        wanted = {"model": MODEL, "prompt": prompt, "temperature": 0, "timeout": TIMEOUT_S, **body}
        if wanted.get("stream"):
            wanted["stream_options"] = {"include_usage": True}
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=wanted) as reply:
                answer.status, answer.headers = reply.status, dict(reply.headers)
                if reply.status == 200 and wanted.get("stream"):
                    await _follow(reply, answer)
                else:
                    _take(answer, await reply.json())
        except aiohttp.ClientError as error:
            answer.broken = f"{type(error).__name__}: {error}"


async def _follow(reply: aiohttp.ClientResponse, answer: Answer) -> None:
    async for line in reply.content:
        data = line.decode().rstrip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if data.startswith("{"):
            _take(answer, json.loads(data))
    answer.broken = "no [DONE]"


def _take(answer: Answer, said: dict[str, Any]) -> None:
    answer.error = said.get("error", {})
    answer.id = said.get("id", answer.id)
    answer.usage = said.get("usage") or answer.usage
    for choice in said.get("choices", ()):
        answer.chunks += 1
        answer.text += choice["text"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
