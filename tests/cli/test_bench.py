"""`slipstream bench`: what it counts, and as what."""

import asyncio
import json

import pytest

from cli.fake_server import FakeServer
from cli.terminal import Terminal
from slipstream.cli.bench import report_of, screen
from slipstream.cli.bench_load import Answered, Failed, Load, Measured
from slipstream.cli.client_config import BenchConfig
from slipstream.cli.main import main
from slipstream.client.api import Api
from slipstream.errors import ExitCode

Capture = pytest.CaptureFixture[str]


def bench(fake: FakeServer, *flags: str) -> int:
    return main(["bench", "--url", fake.url, "--requests", "6", "--warm-up", "1", *flags])


def test_all_answers_are_counted(fake: FakeServer, capsys: Capture) -> None:
    fake.pause_s = 0.002
    flags = ["--json", "--concurrency", "2", "--prompt-tokens", "5", "--output-tokens", "9"]
    assert bench(fake, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["answers"], report["refused"], report["errors"]) == (6, 0, {})
    assert report["output_tokens"] == 18 and report["cached_tokens"] == 12
    assert set(report["latencies_ms"]) == {"ttft", "tpot", "itl", "e2e"}
    assert len(fake.asked) == 7
    assert all(len(body["prompt"]) == 5 for body in fake.asked)
    assert len({tuple(body["prompt"]) for body in fake.asked}) == 7
    body = fake.asked[0]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (9, 0, True)


def test_a_chat_is_asked_in_words(fake: FakeServer, capsys: Capture) -> None:
    flags = ["--api", "chat", "--no-ignore-eos", "--prompt-tokens", "4", "--warm-up", "0"]
    assert bench(fake, *flags) == 0
    body = fake.asked[0]
    assert len(body["messages"][0]["content"].split()) == 4 and "ignore_eos" not in body
    assert "4 words in" in capsys.readouterr().out


def test_the_table(fake: FakeServer, capsys: Capture) -> None:
    fake.pause_s = 0.002
    assert bench(fake) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"fake-1b at {fake.url}"
    assert lines[1] == "6 requests, 8 at a time; 128 token ids in, 64 tokens out"
    assert lines[3].startswith("answers    6 in ")
    assert [line.split()[0] for line in lines[-4:]] == ["TTFT", "TPOT", "ITL", "E2E"]
    assert err == "", "a bar is for terminals alone"


def test_refusals_are_no_errors_and_are_waited_out(fake: FakeServer, capsys: Capture) -> None:
    fake.refusals = 2
    assert bench(fake, "--warm-up", "0", "--concurrency", "1", "--requests", "3", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["answers"], report["refused"], report["retry_after_s"]) == (1, 2, 1.0)
    assert report["errors"] == {} and report["elapsed_s"] > 2.0, "a second for each refusal"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("refused", "HTTP 500"),
        ("error", "an error in the stream"),
        ("no_usage", "an answer without usage"),
        ("cut", "the answer was cut off"),
    ],
)
def test_errors_by_kind(fake: FakeServer, fault: str, kind: str, capsys: Capture) -> None:
    fake.fault = fault
    assert bench(fake, "--json") == ExitCode.FAILED
    report = json.loads(capsys.readouterr().out)
    ((name, count),) = report["errors"].items()
    assert count == 6 and name.startswith(kind)
    assert report["answers"] == 0 and report["latencies_ms"] == {}


async def test_an_open_loop_does_not_wait_for_answers(fake: FakeServer) -> None:
    """All are asked while the first one is still answered."""
    fake.pause_s = 0.3
    config = BenchConfig(rate=1000.0, url=fake.url)
    async with Api(fake.url) as api:
        load = Load(api, "m", config, "0")
        running = asyncio.create_task(load.run(20, lambda done, total: None))
        async with asyncio.timeout(10):
            while len(fake.asked) < 20:
                assert not load.measured.done
                await asyncio.sleep(0.01)
            await running
    assert load.measured.done == 20 and not load.measured.failures


async def test_a_closed_loop_has_no_more_at_a_time(fake: FakeServer) -> None:
    fake.pause_s = 0.05
    async with Api(fake.url) as api:
        load = Load(api, "m", BenchConfig(concurrency=3), "0")
        most = 0

        def advance(done: int, total: int) -> None:
            nonlocal most
            most = max(most, len(fake.asked) - done)

        await load.run(9, advance)
    assert most <= 3 and load.measured.done == 9


async def test_what_was_there_at_ctrl_c_is_kept(fake: FakeServer) -> None:
    async with Api(fake.url) as api:
        load = Load(api, "m", BenchConfig(concurrency=1), "0")

        def stop(done: int, total: int) -> None:
            if done == 2:
                running.cancel()

        running = asyncio.create_task(load.run(1000, stop))
        with pytest.raises(asyncio.CancelledError):
            await running
    report = report_of("u", "m", BenchConfig(requests=1000), load.measured)
    assert report.ended == 2 and report.elapsed_s > 0
    assert "stopped after 2 of them" in screen(report)


def test_quantiles_and_rates_by_hand() -> None:
    answers = [Answered(0.1 * n, 1.0, 0.01, [0.01, 0.03], 10, 0, 20) for n in range(1, 12)]
    failures = [Failed("HTTP 429", 429), Failed("HTTP 429", 429, 3.0), Failed("gone")]
    measured = Measured(elapsed_s=2.0, answers=answers, failures=failures)
    report = report_of("u", "m", BenchConfig(requests=14, api_key="hunter2"), measured)
    assert report.latencies_ms["ttft"]["p50"] == pytest.approx(600)
    assert report.latencies_ms["ttft"]["p90"] == pytest.approx(1000)
    assert report.latencies_ms["itl"]["p50"] == pytest.approx(20)
    assert (report.requests_per_s, report.output_tokens_per_s) == (5.5, 110)
    assert (report.refused, report.retry_after_s, report.errors) == (2, None, {"gone": 1})
    assert "2 with 429, without Retry-After" in screen(report)
    assert report.load.api_key == ""


def test_no_server(capsys: Capture) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:9"]) == ExitCode.SETUP
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("slipstream bench: no server at http://127.0.0.1:9: Connection refused")


def test_in_a_terminal_there_is_a_bar_and_ctrl_c_shows_what_there_is(fake: FakeServer) -> None:
    fake.pause_s = 0.05
    terminal = Terminal("bench", "--url", fake.url, "--requests", "1000", "--warm-up", "0")
    try:
        terminal.until("requests")
        terminal.until("/1000")
        while len(fake.asked) < 20:
            terminal.until("/1000")
        terminal.type("\x03")
        terminal.until("stopped after ")
        assert terminal.wait() == ExitCode.INTERRUPTED
        assert "errors     0" in terminal.text and "Traceback" not in terminal.text
    finally:
        terminal.close()
