"""The catalogue of bad inputs against a whole stack: each gets its answer, and harms nobody."""

import asyncio
import time
from collections.abc import Sequence

import aiohttp
import pytest
from yarl import URL

from e2e.bad_inputs import BODIES, LEAKS, PATHS, Case
from e2e.client import Client
from e2e.stack import Stack

SOON_S = 2.0
"""A schema may be looked at for so long; everything else takes milliseconds."""


def _groups() -> list[tuple[str, list[Case]]]:
    by: dict[int, list[Case]] = {}
    for case in [*BODIES, *PATHS]:
        by.setdefault(case.number, []).append(case)
    return [(f"{number}", cases) for number, cases in sorted(by.items())]


@pytest.mark.parametrize(("number", "cases"), _groups(), ids=[name for name, _ in _groups()])
async def test_a_bad_input_gets_its_answer_and_harms_nobody(
    stack: Stack, client: Client, number: str, cases: Sequence[Case]
) -> None:
    async with aiohttp.ClientSession(skip_auto_headers=["Content-Type"]) as session:
        for case in cases:
            began_s = time.monotonic()
            url = URL(stack.url + case.path, encoded=True)
            async with session.request(
                case.method, url, data=case.body or None, headers=case.headers
            ) as reply:
                text = (await reply.read()).decode()
                took_s = time.monotonic() - began_s
                _judge(case, reply, text)
                answer = {} if reply.status == 200 else (await reply.json())["error"]
            if case.status != 200:
                assert took_s < SOON_S, case.what
                assert case.code in (None, answer["code"]), (case.what, answer)
                assert case.param in (None, answer["param"]), (case.what, answer)
        assert (await client.complete("Still there?", max_tokens=1)).finish_reason == "length"


def _judge(case: Case, reply: aiohttp.ClientResponse, text: str) -> None:
    assert reply.status == case.status, (case.what, text[:500])
    assert reply.headers["x-request-id"] and reply.content_type in ("application/json",), case.what
    assert not [leak for leak in LEAKS if leak in text], (case.what, text[:500])
    assert "\x1b" not in text and len(text) < 4000, case.what
    assert "Access-Control-Allow-Origin" not in reply.headers


async def test_nothing_is_held_after_all_of_them(stack: Stack) -> None:
    await asyncio.to_thread(stack.until_settled)


def test_the_catalogue_is_whole() -> None:
    elsewhere = {14, 15, 16, 17, 18, 19, 20, 61, 83, 85, 86, 87, 88, 94, 95, 96, 97}
    assert {case.number for case in [*BODIES, *PATHS]} | elsewhere == set(range(1, 99))
