"""A trace against a fake server: what is sent when, and what is counted."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from loadtest.fake_chat import Fake
from slipstream.loadtest.load.sample import Sample
from slipstream.loadtest.replay.__main__ import main, parse, replay, requests_of
from slipstream.loadtest.replay.client import Request
from slipstream.loadtest.replay.prompts import Size, reusable_tokens, token_ids
from slipstream.loadtest.replay.report import Limits, ReplayReport, report_of, table
from slipstream.simulate.trace import read_trace, reusable_blocks
from slipstream.types import BLOCK_TOKENS

TRACE = Path(__file__).resolve().parents[1] / "data" / "mooncake_conversation_head.jsonl"
SMALL = ("--chunk-tokens", "16", "--max-output-tokens", "5", "--speed", "100")


async def against(fake: Fake, *words: str) -> ReplayReport:
    async with TestServer(fake.application()) as server:
        return await replay(parse([str(TRACE), "--url", str(server.make_url("")), *words]))


@pytest.mark.parametrize("chunk_tokens", [512, 32])
def test_equal_ids_are_equal_tokens(chunk_tokens: int) -> None:
    size = Size(chunk_tokens=chunk_tokens, max_prompt_tokens=chunk_tokens * 6)
    trace = read_trace(TRACE)
    prompts = [token_ids(request, size) for request in trace]
    for one, prompt in zip(trace, prompts, strict=True):
        assert len(prompt) == min(6 * chunk_tokens, round(one.prompt_tokens * chunk_tokens / 512))
        for other, its in zip(trace, prompts, strict=True):
            pairs = list(zip(one.chunks, other.chunks, strict=False))
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
            length = min(same * chunk_tokens, len(prompt), len(its))
            assert prompt[:length] == its[:length]
            assert prompt[: length + 4] != its[: length + 4] or length in (len(prompt), len(its))


def test_what_can_be_reused_is_what_the_simulator_says() -> None:
    trace = read_trace(TRACE)
    hits, _ = reusable_blocks(trace)
    prompts = [token_ids(request, Size()) for request in trace]
    assert hits > len(trace) and reusable_tokens(prompts) == hits * BLOCK_TOKENS
    assert reusable_tokens([[1] * 32, [1] * 32]) == 16  # the last token is computed in any case
    assert reusable_tokens([[1] * 33, [1] * 33, [2, *[1] * 32]]) == 32


def test_requests_come_at_the_times_of_the_trace() -> None:
    stamped = requests_of(parse([str(TRACE), "--url", "x", "--arrivals", "stamped"]))
    fast = requests_of(parse([str(TRACE), "--url", "x", "--arrivals", "stamped", "--speed", "10"]))
    assert {request.at_s for request in stamped} >= {0.0, 3.0}
    assert [r.at_s for r in fast] == [pytest.approx(r.at_s / 10) for r in stamped]
    some = requests_of(parse([str(TRACE), "--url", "x", "--limit", "3", *SMALL]))
    assert len(some) == 3 and {request.output_tokens for request in some} <= {1, 2, 3, 4, 5}


async def test_a_replay() -> None:
    fake = Fake(room=99)
    report = await against(fake, *SMALL)
    assert report.ok and report.outcomes == {"right": 24} and report.good == 24
    sent = [body["prompt"] for body in fake.bodies]
    wanted = requests_of(parse([str(TRACE), "--url", "x", *SMALL]))
    assert sorted(sent) == sorted(request.prompt for request in wanted)
    assert report.prompt_tokens == sum(map(len, sent))
    assert report.cached_share == pytest.approx(0.5, abs=0.01)
    assert 0 < report.reusable_share < 0.2
    assert report.tokens == sum(body["max_tokens"] for body in fake.bodies)
    assert report.elapsed_s > 0.05 and report.goodput_per_s > 0
    shown = table(report)
    assert "24 right" in shown and "| TTFT, ms |" in shown and "100% inside" in shown


def test_good_is_inside_both_limits() -> None:
    def sample(ttft_s: float, gap_s: float, **changes: Any) -> Sample:
        times_s = [1 + ttft_s + gap_s * n for n in range(5)]
        fields = {"outcome": "right", "tokens": 5, "end_s": times_s[-1], **changes}
        where = {"phase": "", "prompt": "", "kind": "", "attempt": 0}
        return Sample(**where, planned_s=1, sent_s=1, times_s=times_s, **fields)

    samples = [sample(0.5, 0.1), sample(1.5, 0.1), sample(0.5, 0.3), sample(0.5, 0.1)]
    samples[3].outcome = "wrong"
    samples.append(sample(0.5, 0.1, outcome="refused"))
    requests = [Request(1.0, [*range(64)], 5)] * 5
    report = report_of(requests, samples, Limits(1.0, 0.2), {})
    assert report.reusable_share == 3 * 48 / (4 * 64)  # of those that were accepted
    assert report.good == 1 and report.good_share == 0.2 and not report.ok
    assert report.tpot_s.p50 == pytest.approx(0.1) and report.tpot_s.count == 3


@pytest.mark.parametrize(
    ("fault", "outcome", "why"),
    [
        ("500", "error", "HTTP 500: .*out of order"),
        ("cut", "lost", "Error"),
        ("error", "lost", "lost it"),
        ("silent", "lost", "no end after 1 s"),
        ("unfinished", "lost", "without finish_reason"),
        ("short", "wrong", "usage says"),
    ],
)
async def test_bad_answers_are_counted(fault: str, outcome: str, why: str) -> None:
    fake = Fake(room=99, fault=fault)
    report = await against(fake, *SMALL, "--timeout-s", "1")
    assert report.outcomes == {"right": 24 - fake.seen["bad"], outcome: fake.seen["bad"]}
    assert fake.seen["bad"] > 3 and not report.ok
    assert all(part in report.failures[0] for part in why.split(".*")), report.failures


async def test_refusals_are_no_failures_but_not_good() -> None:
    fake = Fake(room=2, token_s=0.02)
    report = await against(fake, *SMALL)
    assert report.ok and report.outcomes["refused"] == fake.seen["refused"] > 1
    assert report.good == fake.seen["accepted"] < report.requests
    silent = Fake(room=1, token_s=0.02, retry_after="")
    report = await against(silent, *SMALL)
    assert not report.ok and report.outcomes["error"] == silent.seen["refused"]


async def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    async with TestServer(Fake(room=99, fault="short").application()) as server:
        url = str(server.make_url(""))
        words = [str(TRACE), "--url", url, *SMALL, "--limit", "6", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", ["replay", *words])
        assert await asyncio.to_thread(main) == 1
    numbers = json.loads(out.read_text())
    assert numbers["outcomes"] == {"right": 5, "wrong": 1}
    assert numbers["settings"]["trace"] == TRACE.name and str(TRACE) not in out.read_text()
    assert "6 requests in" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["replay", str(tmp_path / "none"), "--url", url])
    assert await asyncio.to_thread(main) == 2
    assert "none: No such file" in capsys.readouterr().err
