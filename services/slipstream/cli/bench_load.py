"""The load of `slipstream bench`: closed, so many at a time, or open, so many a second."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import msgspec

from slipstream.cli.client_config import BenchConfig
from slipstream.client.api import Api, ApiError
from slipstream.client.prompts import token_prompt, word_prompt
from slipstream.client.stream import AnswerError, Meter

REFUSED = 429
LONGEST_PAUSE_S = 10.0
"""After a refusal a client of the closed loop waits as it is told, but not for longer."""
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Answered(msgspec.Struct, frozen=True):
    """A whole answer. Times from the moment before the request was sent."""

    ttft_s: float
    e2e_s: float
    tpot_s: float
    """Of answers with one token: 0, and not counted."""
    gaps_s: list[float]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Failed(msgspec.Struct, frozen=True):
    """`kind`: what failures are counted by."""

    kind: str
    status: int = 0
    retry_after_s: float | None = None


class Measured(msgspec.Struct):
    elapsed_s: float = 0.0
    answers: list[Answered] = []
    failures: list[Failed] = []

    @property
    def done(self) -> int:
        return len(self.answers) + len(self.failures)


_One: TypeAlias = Callable[[int], Coroutine[Any, Any, Answered | Failed]]


class Load:
    """`seed`: of prompts and arrivals; other ones share nothing."""

    def __init__(self, api: Api, model: str, config: BenchConfig, seed: str) -> None:
        self._api, self._model, self._config, self._seed = api, model, config, seed
        self.measured = Measured()

    async def run(self, requests: int, advance: Callable[[int, int], None]) -> None:
        """Fills `measured`. Calls `advance` with how many have ended, however. If it is cancelled,
        what there is holds."""
        measured = self.measured
        advance(0, requests)

        async def one(number: int) -> Answered | Failed:
            found = await self._ask(number)
            if isinstance(found, Failed):
                measured.failures.append(found)
            else:
                measured.answers.append(found)
            advance(measured.done, requests)
            return found

        begin_s = time.perf_counter()
        try:
            await (self._open if self._config.rate else self._closed)(requests, one)
        finally:
            measured.elapsed_s = time.perf_counter() - begin_s

    async def _closed(self, requests: int, one: _One) -> None:
        numbers = iter(range(requests))

        async def client() -> None:
            for number in numbers:
                found = await one(number)
                if isinstance(found, Failed) and found.status == REFUSED:
                    await asyncio.sleep(min(found.retry_after_s or 1.0, LONGEST_PAUSE_S))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._config.concurrency, requests)):
                group.create_task(client())

    async def _open(self, requests: int, one: _One) -> None:
        draw = random.Random(f"{self._seed} arrivals")
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(one(number))
                due_s += draw.expovariate(self._config.rate)

    async def _ask(self, number: int) -> Answered | Failed:
        body = self._body(f"{self._seed} {number}")
        meter = Meter(time.perf_counter(), keep_gaps=True)
        stream = self._api.stream(_PATHS[self._config.api], body, meter)
        begin_s = time.perf_counter()
        try:
            async with contextlib.aclosing(stream):
                async for _ in stream:
                    pass
        except ApiError as error:
            code = f" {error.code}" if error.code else ""
            kind = f"HTTP {error.status}{code}" if error.status else str(error)
            return Failed(kind, error.status, error.retry_after_s)
        except AnswerError as error:
            return Failed(str(error))
        if meter.usage is None or not meter.first_s:
            return Failed("an answer without " + ("tokens" if meter.usage else "usage"))
        return Answered(
            ttft_s=meter.first_s,
            e2e_s=time.perf_counter() - begin_s,
            tpot_s=meter.tpot_s if meter.tokens > 1 else 0.0,
            gaps_s=meter.gaps_s,
            prompt_tokens=meter.usage.prompt_tokens,
            cached_tokens=meter.usage.cached_tokens,
            output_tokens=meter.tokens,
        )

    def _body(self, seed: str) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": config.output_tokens,
            "temperature": 0,
        }
        if config.ignore_eos:
            body["ignore_eos"] = True
        if config.api == "chat":
            words = word_prompt(seed, config.prompt_tokens)
            body["messages"] = [{"role": "user", "content": words}]
        else:
            body["prompt"] = token_prompt(seed, config.prompt_tokens)
        return body
