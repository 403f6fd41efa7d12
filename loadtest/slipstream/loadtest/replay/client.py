"""Sends prompts at their times, whatever becomes of those before, and keeps a sample of each."""

import asyncio
import time
from collections.abc import Sequence

import aiohttp
import msgspec

from slipstream.loadtest.load.connection import accepted_retry_after
from slipstream.loadtest.load.sample import Sample
from slipstream.loadtest.load.stream import Stream, short


class Request(msgspec.Struct, frozen=True):
    at_s: float
    prompt: list[int]
    output_tokens: int


class Replayer:
    """Refused requests are not sent again: the trace says when who asks."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str, timeout_s: float
    ) -> None:
        self._session, self._url, self._model = session, f"{url}/v1/completions", model
        self._timeout_s = timeout_s
        self._origin_s = 0.0

    async def run(self, requests: Sequence[Request]) -> list[Sample]:
        """In the order of the requests."""
        self._origin_s = time.monotonic()
        return await asyncio.gather(*(self._ask(n, r) for n, r in enumerate(requests)))

    def _now_s(self) -> float:
        return time.monotonic() - self._origin_s

    async def _ask(self, number: int, request: Request) -> Sample:
        await asyncio.sleep(max(0.0, request.at_s - self._now_s()))
        sample = Sample(
            phase="replay",
            prompt=f"request {number}",
            kind="replay",
            attempt=0,
            planned_s=request.at_s,
            sent_s=self._now_s(),
        )
        stream = Stream()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read(request, sample, stream)
        except TimeoutError:
            sample.outcome, sample.problem = "lost", f"no end after {self._timeout_s:g} s"
        except (aiohttp.ClientError, ConnectionError) as error:
            # Without a stream the server has accepted nothing.
            sample.outcome = "lost" if sample.outcome == "right" else "error"
            sample.problem = f"{type(error).__name__}: {error}"
        sample.end_s = self._now_s()
        sample.times_s = [at_s - self._origin_s for at_s in stream.times_s]
        sample.tokens, sample.prompt_tokens = stream.tokens, stream.prompt_tokens
        sample.cached_tokens = stream.cached_tokens
        return sample

    async def _read(self, request: Request, sample: Sample, stream: Stream) -> None:
        headers = {"Content-Type": "application/json"}
        sample.outcome = "error"
        async with self._session.post(self._url, data=self._body(request), headers=headers) as got:
            if got.status == 429:
                try:
                    accepted_retry_after(got.headers.get("Retry-After"))
                    sample.outcome = "refused"
                except ValueError as error:
                    sample.problem = f"HTTP 429: {error}"
            elif got.status != 200:
                sample.problem = f"HTTP {got.status}: {short(await got.content.read(2000))}"
            else:
                sample.outcome = "right"
                async for data in got.content.iter_any():
                    stream.feed(data, time.monotonic())
                broken = stream.broken(request.output_tokens)
                if broken is not None:
                    sample.outcome = "wrong" if broken.wrong else "lost"
                    sample.problem = broken.told

    def _body(self, request: Request) -> bytes:
        return msgspec.json.encode(
            {
                "model": self._model,
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
