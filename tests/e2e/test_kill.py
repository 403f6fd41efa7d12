"""SIGKILL to each process while requests run: answers stay right, and nothing is left held."""

import asyncio
import re
from typing import Any

import pytest

from e2e.client import Answer, Client, eventually
from e2e.stack import Stack

MAX_TOKENS = 128
GREEDY: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 1234}
HELD: dict[str, Any] = {
    **SEEDED,
    "structured_outputs": {"regex": "([a-z]{3} ){400}"},
    "bad_words": ["the"],
    "logit_bias": {"1000": 5},
}
"""To a grammar that does not end before the answer."""
Asked = list[tuple[list[int], dict[str, Any]]]


def _words(length: int, step: int) -> list[int]:
    return [(step * 15_485_863 * (index + 1)) % 40_000 + 200 for index in range(length)]


EARLY: Asked = [
    (_words(3, 1), GREEDY),
    (_words(60, 2), SEEDED),
    (_words(100, 3), GREEDY),
    (_words(33, 4), {**SEEDED, "seed": 99}),
    (_words(45, 7), HELD),
]
"""They decode when the blow comes."""
LATE: Asked = [(_words(500, 5), GREEDY), (_words(400, 6), SEEDED)]
"""Their prompts are on their way or computed."""


@pytest.fixture(scope="module")
def undisturbed(twin: Stack) -> list[str]:
    async def ask() -> list[str]:
        async with Client(twin.url) as client:
            answers = await asyncio.gather(
                *(client.complete(prompt, **body) for prompt, body in EARLY + LATE)
            )
        return [answer.text for answer in answers]

    texts = asyncio.run(ask())
    assert re.fullmatch("([a-z]{3} )*[a-z]{0,3}", texts[len(EARLY) - 1])
    return texts


async def _begin(client: Client, asked: Asked, salt: str) -> list[tuple[Answer, Any]]:
    """`salt`: nothing of an earlier test is found in a cache."""
    return [client.stream(prompt, cache_salt=salt, **body) for prompt, body in asked]


@pytest.mark.parametrize(
    "victim", ["tokenizer-0", "scheduler-0", "prefill-0", "decode-0", "kvindex-0", "redis"]
)
async def test_answers_are_right_whoever_dies(
    twin: Stack, twin_client: Client, undisturbed: list[str], victim: str
) -> None:
    old = twin.pids()[victim]
    early = await _begin(twin_client, EARLY, victim)
    await eventually(lambda: all(a.chunks >= 3 for a, _ in early))
    late = await _begin(twin_client, LATE, victim)
    await eventually(lambda: _arrived(twin, late))
    assert not any(following.done() for _, following in early + late)
    twin.kill_child(victim)
    await asyncio.gather(*(following for _, following in early + late))
    for (answer, _), text in zip(early + late, undisturbed, strict=True):
        assert answer.status == 200 and not answer.broken, (answer.error, answer.broken)
        assert not answer.error, answer.error
        assert answer.text == text
        assert answer.finish_reason == "length"
        assert answer.usage["completion_tokens"] == MAX_TOKENS
    await asyncio.to_thread(twin.until_whole)
    assert twin.pids()[victim] != old
    after = await twin_client.complete(EARLY[2][0], **GREEDY)
    assert after.text == undisturbed[2]
    twin.until_settled()


def _arrived(stack: Stack, late: list[tuple[Answer, Any]]) -> bool:
    """The scheduler has placed the two prompts of this round."""
    placed = [
        fields
        for _, name, fields in stack.story("scheduler")
        if name == "Send" and fields["message"]["type"] == "Prefill"
    ]
    recent = placed[-len(late) :]
    return sorted(len(fields["message"]["prompt"]) // 4 for fields in recent) == sorted(
        len(prompt) for prompt, _ in LATE
    )


async def test_what_a_dead_frontend_had_is_freed(
    twin: Stack, twin_client: Client, undisturbed: list[str]
) -> None:
    endless = {**GREEDY, "max_tokens": 1400}
    running = await _begin(twin_client, [(prompt, endless) for prompt, _ in EARLY], "frontend")
    await eventually(lambda: all(a.chunks >= 3 for a, _ in running))
    steps = twin.worker("steps")["decode-0"]
    twin.kill_child("frontend-0")
    await asyncio.gather(*(following for _, following in running))
    assert all(answer.broken and not answer.finish_reason for answer, _ in running)
    await asyncio.to_thread(twin.until_whole)
    # They did not just run to their ends.
    assert twin.worker("steps")["decode-0"] - steps < 1300
    async with Client(twin.url) as client:
        after = await client.complete(EARLY[2][0], **GREEDY)
    assert after.text == undisturbed[2]
    twin.until_settled()
