"""Two hundred requests in a row, each ended in its own way, leave nothing running and nothing
held."""

import asyncio
import contextlib
import random

from e2e.client import Client, eventually
from e2e.stack import Stack

REQUESTS, AT_A_TIME = 200, 8


async def test_two_hundred_requests_leave_nothing(stack: Stack, client: Client) -> None:
    rng = random.Random(2)
    room = asyncio.Semaphore(AT_A_TIME)
    shared = [rng.randrange(200, 40_000) for _ in range(48)]
    ends = {"length": 0, "cancelled": 0}

    async def one(kind: str, prompt: list[int], max_tokens: int, patience: int) -> None:
        body = {"max_tokens": max_tokens, "ignore_eos": True}
        async with room:
            if kind == "whole":
                answer = await client.complete(prompt, **body)
            else:
                answer, following = client.stream(prompt, **body)
                if kind == "cancelled":
                    await eventually(lambda: answer.chunks >= patience or following.done())
                    # One turn of the loop at least: a stream that never began was never sent.
                    await asyncio.sleep(0.005)
                    following.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await following
                if following.cancelled():
                    ends["cancelled"] += 1
                    return
        assert answer.finish_reason == "length", (answer.broken, answer.error)
        assert answer.usage["completion_tokens"] == max_tokens
        ends["length"] += 1

    def drawn() -> tuple[str, list[int], int, int]:
        kind = rng.choice(["whole", "streamed", "cancelled"])
        own = [rng.randrange(200, 40_000) for _ in range(rng.randrange(1, 40))]
        prompt = shared[: rng.choice([0, 16, 48])] + own
        # `patience` 0: the client leaves while its prompt is on its way or computed.
        tokens = rng.randrange(20, 40) if kind == "cancelled" else rng.randrange(1, 8)
        return kind, prompt, tokens, rng.choice([0, 0, 1, 5])

    await asyncio.gather(*(one(*drawn()) for _ in range(REQUESTS)))
    assert ends["length"] >= REQUESTS // 2 and ends["cancelled"] >= REQUESTS // 5, ends
    stack.until_settled()
    for name in ("blocks_leased", "blocks_quarantined"):
        assert set(stack.worker(name)) >= {"prefill-0", "decode-0"}
    assert stack.gauges()["scheduler", "scheduler_requests_ended_total"] > 0
