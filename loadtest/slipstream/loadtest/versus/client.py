"""One client for all servers: an OpenAI completion as a stream, timed as it comes in."""

import time

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from slipstream.client import stream
from slipstream.client.stream import short
from slipstream.loadtest.versus.errors import AnswerError

PATIENCE_S = 1800.0
"""Longer than any answer takes; a server that hangs ends its measurement, not the comparison."""


class Answer(msgspec.Struct, frozen=True):
    """Times from the moment before the request was sent."""

    first_s: float
    """To the first chunk with a choice in it, whether its token has made text yet or not."""
    last_s: float
    tokens: int
    tpot_s: float


class Meter(stream.Meter):
    """Takes whole answers alone."""

    def answer(self, wanted: int) -> Answer:
        """AnswerError unless exactly `wanted` tokens came."""
        if self.tokens != wanted:
            raise AnswerError(f"{self.tokens} tokens instead of {wanted}")
        return Answer(self.first_s, self.last_s, self.tokens, self.tpot_s)


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
                    raise AnswerError(f"HTTP {reply.status}: {short(text)}")
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
