"""One client for all servers: an OpenAI completion as a stream, timed as it comes in."""

import time
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from slipstream.loadtest.versus.errors import AnswerError

PATIENCE_S = 1800.0
"""Longer than any answer takes; a server that hangs ends its measurement, not the comparison."""


class Answer(msgspec.Struct, frozen=True):
    """Times from the moment before the request was sent."""

    first_s: float
    """To the first chunk with a choice in it, whether its token has made text yet or not."""
    last_s: float
    tokens: int

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; a chunk may hold several of them."""
        return (self.last_s - self.first_s) / max(1, self.tokens - 1)


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Meter:
    """Reads the bytes of one stream: when its first and its last choice came, and its usage."""

    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self._first_s = self._last_s = 0.0
        self._tokens = 0
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """AnswerError if the server says that it failed."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = line.removeprefix(b"data:").strip()
            if len(event) == len(line) or event in (b"", b"[DONE]"):
                continue  # a comment, an empty line, the end
            try:
                chunk = _decode(event)
            except msgspec.DecodeError:
                raise AnswerError(f"a chunk that cannot be read: {_short(event)}") from None
            if chunk.error is not None:
                raise AnswerError(
                    f"an error in the stream: {_short(msgspec.json.encode(chunk.error))}"
                )
            if chunk.choices:
                self._last_s = now_s - self._begin_s
                self._first_s = self._first_s or self._last_s
            if chunk.usage is not None:
                self._tokens = chunk.usage.completion_tokens

    def answer(self, wanted: int) -> Answer:
        """AnswerError unless exactly `wanted` tokens came."""
        if self._tokens != wanted:
            raise AnswerError(f"{self._tokens} tokens instead of {wanted}")
        return Answer(self._first_s, self._last_s, self._tokens)


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        """`url`: of the server, without `/v1`."""
        self._session, self._url, self._model = session, f"{url}/v1/completions", model

    async def complete(self, prompt: list[int], max_tokens: int) -> Answer:
        """The times of one answer, drawn greedily and not ended by its end-of-text token.
        AnswerError: refused, broken off, or of another length."""
        body = msgspec.json.encode(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        meter = Meter(time.perf_counter())
        try:
            async with self._session.post(
                self._url, data=body, headers={"content-type": "application/json"}
            ) as reply:
                if reply.status != 200:
                    text = await reply.content.read(500)
                    raise AnswerError(f"HTTP {reply.status}: {_short(text)}")
                async for data in reply.content.iter_any():
                    meter.feed(data, time.perf_counter())
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise AnswerError(f"{type(error).__name__}: {error}") from None
        return meter.answer(max_tokens)


def new_session() -> aiohttp.ClientSession:
    """A connection for each request: some servers end theirs behind an answer, unannounced."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
    )


async def model_name(session: aiohttp.ClientSession, url: str) -> str:
    """What the server calls the model that it has. AnswerError if it does not say."""
    try:
        async with session.get(f"{url}/v1/models") as reply:
            return str((await reply.json(content_type=None))["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
        raise AnswerError(f"/v1/models: {type(error).__name__}: {error}") from None


async def drafts(session: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    """Tokens that the server has drafted so far, and those of them that were right; 0 of a server
    that says nothing about it."""
    try:
        async with session.get(f"{url}/metrics") as reply:
            text = await reply.text() if reply.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, UnicodeError):
        return 0.0, 0.0
    drafted, right = (
        sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"slipstream_worker_{name}_total"
        )
        for name in ("draft_tokens", "draft_tokens_right")
    )
    return drafted, right


def _short(text: bytes) -> str:
    return " ".join(text.decode("utf-8", "replace").split())[:200]
