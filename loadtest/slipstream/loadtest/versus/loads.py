"""What is asked of every server: closed loops of random prompts, and prompts with one beginning."""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator

import msgspec
import numpy as np

from slipstream.loadtest.versus.client import Answer, Client
from slipstream.loadtest.versus.errors import AnswerError

TOKEN_IDS = range(256, 40_000)
"""Ids that are text in the vocabulary of every model here: no special tokens, no single bytes."""
WARM_UP_TOKENS = 16
PREFIX = "prefix"


class Load(msgspec.Struct, frozen=True):
    """A closed loop: `concurrency` clients, each asking anew as soon as it has its answer."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    requests: int
    period: int = 0
    """Prompts repeat a piece of so many tokens, which a model goes on to do; 0: they do not."""

    @property
    def name(self) -> str:
        again = " repeating" if self.period else ""
        return f"{self.prompt_tokens}/{self.output_tokens} x{self.concurrency}{again}"


class PrefixLoad(msgspec.Struct, frozen=True):
    """One after the other: a new prompt, then others with the same beginning; several times."""

    prefix_tokens: int = 1000
    own_tokens: int = 24
    output_tokens: int = 16
    prefixes: int = 4
    repeats: int = 3
    name: str = PREFIX


def prompt(seed: str, tokens: int, period: int = 0) -> list[int]:
    """Token ids that depend on the seed alone; with a `period` the same so many again and again."""
    draw = random.Random(seed)
    piece = [draw.choice(TOKEN_IDS) for _ in range(period or tokens)]
    return [piece[index % len(piece)] for index in range(tokens)]


async def run(load: Load | PrefixLoad, client: Client, seed: str) -> dict[str, float]:
    """The numbers of one measurement, after a warm-up with other prompts of the same length.
    AnswerError: at least one answer failed."""
    if isinstance(load, PrefixLoad):
        return await _run_prefix(load, client, seed)
    begin_s = time.perf_counter()
    answers = await _closed_loop(load, client, f"{seed} {load.name}")
    elapsed_s = time.perf_counter() - begin_s
    first_ms = [answer.first_s * 1e3 for answer in answers]
    return {
        "output_tok_s": sum(answer.tokens for answer in answers) / elapsed_s,
        "ttft_ms": statistics.median(first_ms),
        "ttft_p99_ms": float(np.quantile(first_ms, 0.99)),
        "tpot_ms": statistics.median(answer.tpot_s * 1e3 for answer in answers),
        "requests": load.requests,
    }


async def warm_up(load: Load | PrefixLoad, client: Client, seed: str) -> None:
    """Twice as many short answers as there will be clients. AnswerError: one failed."""
    match load:
        case Load():
            requests, tokens = 2 * load.concurrency, min(load.output_tokens, WARM_UP_TOKENS)
            short = Load(load.prompt_tokens, tokens, load.concurrency, requests, load.period)
        case PrefixLoad():
            short = Load(load.prefix_tokens + load.own_tokens, load.output_tokens, 1, 2)
    await _closed_loop(short, client, f"{seed} warm-up {load.name}")


async def _closed_loop(load: Load, client: Client, seed: str) -> list[Answer]:
    prompts = [
        prompt(f"{seed} {number}", load.prompt_tokens, load.period)
        for number in range(load.requests)
    ]
    waiting: Iterator[list[int]] = iter(prompts)
    answers: list[Answer] = []
    failures: list[str] = []

    async def ask() -> None:
        for tokens in waiting:
            try:
                answers.append(await client.complete(tokens, load.output_tokens))
            except AnswerError as error:
                failures.append(str(error))

    await asyncio.gather(*(ask() for _ in range(load.concurrency)))
    if failures:
        raise AnswerError(f"{len(failures)} of {load.requests} answers: {failures[0]}")
    return answers


async def _run_prefix(load: PrefixLoad, client: Client, seed: str) -> dict[str, float]:
    """Median TTFT of those that come first, and of those after them."""
    first_ms: list[float] = []
    later_ms: list[float] = []
    for number in range(load.prefixes):
        shared = prompt(f"{seed} {load.name} {number}", load.prefix_tokens)
        for repeat in range(1 + load.repeats):
            own = prompt(f"{seed} {load.name} {number} {repeat}", load.own_tokens)
            answer = await client.complete(shared + own, load.output_tokens)
            (later_ms if repeat else first_ms).append(answer.first_s * 1e3)
    first, later = statistics.median(first_ms), statistics.median(later_ms)
    return {"first_ttft_ms": first, "later_ttft_ms": later, "later_of_first": later / first}
