"""Locust against a server that fails in one way or another: the report must say so."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from loadtest.fake_chat import Fake

ROOT = Path(__file__).resolve().parents[2]
LOCUSTFILE = ROOT / "loadtest/slipstream/loadtest/load/locustfile.py"
SHORT = ("--warm-up-s", "0", "--drain-s", "3", "--prompt-tokens", "8", "--output-tokens", "8")
USERS = (*SHORT, "--scenario", "multi-turn", "--phase-s", "0.5", "--clients", "3")


class Outcome:
    def __init__(self, code: int, said: str, folder: Path) -> None:
        self.code, self.said = code, said
        found = folder / "report.json"
        self.report: dict[str, Any] = json.loads(found.read_bytes()) if found.exists() else {}

    @property
    def failed(self) -> dict[str, str]:
        """Checks that did not hold, and what they say."""
        return {one["name"]: one["told"] for one in self.report["checks"] if not one["ok"]}


@asynccontextmanager
async def serving(fake: Fake) -> AsyncIterator[str]:
    async with TestServer(fake.application()) as server:
        yield str(server.make_url("")).rstrip("/")


async def locust(url: str, folder: Path, *words: str) -> Outcome:
    """Runs it without its screen, as `python -m slipstream.loadtest.load` does."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    process = await asyncio.create_subprocess_exec(
        *(*command, "--host", url, "--report-dir", str(folder), *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(),
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, said.decode(), folder)


def environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}


class Loads(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.plots = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.plots += tag == "svg"
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


async def test_a_step_to_three_times_what_the_server_can_do(tmp_path: Path) -> None:
    """Four answers of at least 0.2 s at a time are some 18 a second; the rest is refused."""
    fake = Fake(room=4, token_s=0.025)
    words = ("--phase-s", "2", "--capacity-rps", "18", "--retries", "1", "--ttft-target-s", "1")
    async with serving(fake) as url:
        done = await locust(url, tmp_path, *SHORT, *words)
    assert done.code == 0 and not done.failed, done.said
    before, step, _ = done.report["phases"]
    assert [phase["name"] for phase in done.report["phases"]] == ["before", "step", "after"]
    assert step["refused"] > before["refused"] and step["refused_finally"]
    names = ("requests", "attempts", "accepted", "refused")
    counted = {name: sum(phase[name] for phase in done.report["phases"]) for name in names}
    assert counted["attempts"] == fake.seen["asked"] > counted["requests"]
    assert counted["refused"] == fake.seen["refused"]
    assert counted["accepted"] == fake.seen["accepted"]
    assert done.report["client"]["compared"] > 3
    assert "429" in done.said and "TTFT" in done.said and "ITL" in done.said, done.said
    page = (tmp_path / "report.html").read_text()
    seen = Loads()
    seen.feed(page)
    assert seen.plots == 5 and not seen.found
    assert "✓ held" in page and "✗" not in page


async def test_capacity_is_measured(tmp_path: Path) -> None:
    """Three clients, each 8 tokens of some 10 ms: fewer than 37 a second, and not far from it."""
    async with serving(Fake(room=99, token_s=0.01)) as url:
        words = ("--scenario", "steady", "--clients", "3", "--capacity-s", "2", "--phase-s", "1")
        done = await locust(url, tmp_path, *SHORT, *words)
    assert done.code == 0, done.said
    assert [phase["name"] for phase in done.report["phases"]] == ["capacity", "steady"]
    assert 3 < done.report["capacity_rps"] < 37.5


@pytest.mark.parametrize(
    ("fault", "check", "why"),
    [
        ("500", "error", "HTTP 500: "),
        ("cut", "lost", "IncompleteRead"),
        ("error", "lost", "an error: .*lost it"),
        ("silent", "lost", "in flight 3 s after"),
        ("unfinished", "lost", "without finish_reason"),
        ("short", "wrong", "usage says 7 tokens, 8 were asked for"),
        ("different", "wrong", "another answer than before"),
    ],
)
async def test_a_bad_answer_is_noticed(tmp_path: Path, fault: str, check: str, why: str) -> None:
    async with serving(Fake(room=99, fault=fault)) as url:
        done = await locust(url, tmp_path, *USERS, "--repeat-share", "0.8")
    assert done.code == 1, done.said
    assert set(done.failed) == {check}
    first = done.report["failures"][0]
    assert first["outcome"] == check and first["prompt"] in done.failed[check]
    assert why.split(".*")[0] in first["problem"] and why.split(".*")[-1] in first["problem"]


async def test_late_first_tokens_are_noticed(tmp_path: Path) -> None:
    async with serving(Fake(room=99, fault="late")) as url:
        done = await locust(url, tmp_path, *USERS, "--ttft-target-s", "0.3")
    assert done.code == 1 and set(done.failed) == {"p99 TTFT"}, done.said


@pytest.mark.parametrize("retry_after", ["", "soon", "0"])
async def test_a_refusal_must_say_when_to_come_again(tmp_path: Path, retry_after: str) -> None:
    async with serving(Fake(room=1, token_s=0.05, retry_after=retry_after)) as url:
        done = await locust(url, tmp_path, *USERS)
    assert done.code == 1 and set(done.failed) == {"429, Retry-After", "error"}, done.said


async def test_who_is_refused_waits(tmp_path: Path) -> None:
    """Three users, each told to come again in 2 s, which is after the end."""
    fake = Fake(room=0, retry_after="2")
    async with serving(fake) as url:
        done = await locust(url, tmp_path, *USERS)
    assert done.code == 1 and set(done.failed) == {"p99 TTFT"}, done.said
    assert "of 0 accepted" in done.failed["p99 TTFT"]
    (users,) = done.report["phases"]
    assert users["attempts"] == users["refused_finally"] == fake.seen["asked"] == 3


async def test_a_step_that_refuses_nothing_was_no_overload(tmp_path: Path) -> None:
    async with serving(Fake(room=99)) as url:
        done = await locust(url, tmp_path, *SHORT, "--phase-s", "1", "--capacity-rps", "5")
    assert done.code == 1 and set(done.failed) == {"429, Retry-After"}, done.said


@pytest.mark.parametrize(
    ("scenario", "kind", "words"),
    [
        ("cancellations", "cancelled", ("--cancel-share", "0.5")),
        ("slow-readers", "slow", ("--slow-share", "0.5")),
        ("long-prompts", "long", ("--long-share", "0.5", "--long-tokens", "50")),
        ("shared-prompt", "usual", ("--shared-tokens", "30")),
        ("multi-turn", "turn", ("--turns", "3")),
        ("spike", "usual", ("--spike-s", "0.5", "--capacity-rps", "10")),
    ],
)
async def test_scenarios(tmp_path: Path, scenario: str, kind: str, words: tuple[str, ...]) -> None:
    fake = Fake(room=99)
    async with serving(fake) as url:
        own = ("--scenario", scenario, "--phase-s", "0.8", "--clients", "3", *words)
        done = await locust(url, tmp_path, *SHORT, *own)
    assert done.code == 0, done.said
    kinds = {one["name"]: one for one in done.report["kinds"]}
    assert kinds[kind]["accepted"] > 1
    assert kinds[kind]["left"] == kinds[kind]["accepted"] * (kind == "cancelled")
    assert 0.3 < kinds[kind]["cached_share"] <= 0.5 or kind == "cancelled"
    systems = {body["messages"][0]["content"] for body in fake.bodies}
    roles = [message["role"] for body in fake.bodies for message in body["messages"]]
    assert (len(systems) == 1) == (scenario == "shared-prompt")
    assert roles.count("assistant") > 1 or scenario != "multi-turn"


async def test_nobody_there(tmp_path: Path) -> None:
    done = await locust("http://127.0.0.1:9", tmp_path, *USERS)
    assert done.code == 1 and "refused" in done.said and not done.report


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--scenario", "storm"), "--scenario: expected one of steady, step"),
        (("--clients", "0"), "clients"),
    ],
)
async def test_settings_that_cannot_be(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = await locust("http://127.0.0.1:9", tmp_path, *words)
    assert done.code != 0 and told in done.said and "Traceback" not in done.said


async def test_ctrl_c_leaves_a_report_of_what_has_been(tmp_path: Path) -> None:
    """Through the command that people use."""
    fake = Fake(room=99, token_s=0.02)
    async with serving(fake) as url:
        command = [sys.executable, "-m", "slipstream.loadtest.load", "--url", url]
        process = await asyncio.create_subprocess_exec(
            *(*command, "--report-dir", str(tmp_path), *USERS, "--phase-s", "60"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment(),
        )
        async with asyncio.timeout(60):
            await fake.nine.wait()
        process.send_signal(signal.SIGINT)
        said, _ = await process.communicate()
    done = Outcome(process.returncode or 0, said.decode(), tmp_path)
    assert done.code == 128 + signal.SIGINT
    assert set(done.failed) == {"client"} and "interrupted" in done.failed["client"], done.said
    assert done.report["phases"][0]["accepted"] >= 6
