"""Every process is replaced in order while requests run, or is stopped: no request fails."""

import asyncio
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.client import Answer, Client, eventually
from e2e.stack import Stack, ports_in_a_row, until

PROMPTS = [
    [(step * 7_919 * (i + 1)) % 40_000 + 200 for i in range(20 * step)] for step in (1, 3, 5)
]
BODY: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
CLIENTS = 3
ORDER = ("kvindex-0", "tokenizer-0", "scheduler-0", "prefill-0", "decode-0", "frontend-1", "redis")


@pytest.fixture(scope="module")
def pair() -> Iterator[Stack]:
    """Two frontends, as behind a balancer, and one of everything else."""
    stack = Stack(frontend=2, port=ports_in_a_row(2))
    yield stack
    stack.close()


class Load:
    """Clients that ask one thing after the other, at both frontends in turn, until told to stop."""

    def __init__(self, ports: list[int], expected: list[str]) -> None:
        self._clients = [Client(f"http://127.0.0.1:{port}") for port in ports]
        self._expected, self._stop = expected, False
        self.answered = 0
        self.wrong: list[str] = []

    async def run(self, first: int) -> None:
        for number in itertools.count(first):
            if self._stop:
                return
            which = number % len(PROMPTS)
            answer = await self._ask(number, PROMPTS[which])
            self.answered += 1
            if answer.status != 200 or answer.text != self._expected[which]:
                self.wrong.append(f"{answer.status} {answer.error} {answer.broken} {answer.text}")

    async def _ask(self, number: int, prompt: list[int]) -> Answer:
        """As a balancer does: who does not listen, or says that it stops, is passed over."""
        for turn in range(number, number + 2 * len(self._clients)):
            client = self._clients[turn % len(self._clients)]
            answer, following = client.stream(prompt, cache_salt=str(number), **BODY)
            await following
            refused = "Cannot connect" in answer.broken
            if not refused and answer.error.get("code") != "draining":
                return answer
        return answer

    async def stop(self) -> None:
        self._stop = True

    async def close(self) -> None:
        for client in self._clients:
            await client.__aexit__()


async def test_one_process_after_the_other_is_replaced_and_nobody_notices(pair: Stack) -> None:
    ports = [pair.port, pair.port + 1]
    async with Client(pair.url) as client:
        expected = [(await client.complete(prompt, **BODY)).text for prompt in PROMPTS]
    load = Load(ports, expected)
    running = [asyncio.create_task(load.run(100 * n)) for n in range(CLIENTS)]
    try:
        for name in ORDER:
            before, old = load.answered, pair.pids()[name]
            os.kill(old, signal.SIGTERM)
            await eventually(lambda: pair.pids().get(name, old) != old)  # noqa: B023
            await asyncio.to_thread(until, pair.serves, f"ready without the old {name}")
            await eventually(lambda: load.answered >= before + CLIENTS)  # noqa: B023
            assert not load.wrong, f"{name}: {load.wrong}"
    finally:
        await load.stop()
        await asyncio.gather(*running)
        await load.close()
    assert not load.wrong
    pair.until_settled()


async def test_a_worker_that_stands_still_is_killed_and_its_streams_go_on(pair: Stack) -> None:
    long = {**BODY, "max_tokens": 200}
    async with Client(pair.url) as client:
        expected = [(await client.complete(prompt, **long)).text for prompt in PROMPTS]
        begun = [client.stream(prompt, cache_salt="stopped", **long) for prompt in PROMPTS]
        await eventually(lambda: all(answer.chunks >= 3 for answer, _ in begun))
        old = pair.pids()["decode-0"]
        os.kill(old, signal.SIGSTOP)
        await asyncio.to_thread(until, lambda: not pair.epochs(), "/readyz says no")
        await asyncio.gather(*(following for _, following in begun))
        for (answer, _), text in zip(begun, expected, strict=True):
            assert (answer.status, answer.broken, answer.error) == (200, "", {})
            assert answer.text == text
        assert pair.pids()["decode-0"] != old
        assert "decode-0     has given no sign of life for 10 s; killed" in pair.log
    await asyncio.to_thread(pair.until_whole)
