"""`slipstream top`: what it makes of two looks at a cluster, and how it shows that."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import fake_server
from cli.fake_server import FakeServer
from cli.terminal import Terminal
from slipstream.cli.main import main
from slipstream.cli.top_sample import Sample, View, quantile, read_metrics, view
from slipstream.cli.top_table import table
from slipstream.errors import ExitCode
from slipstream.frontend.cluster import Cluster

Capture = pytest.CaptureFixture[str]


def sample(looks: int, at_s: float, counted_by: str = "frontend-0", **changes: Any) -> Sample:
    told = {**fake_server.cluster(looks), **changes}
    counted = read_metrics(fake_server.metrics(looks, counted_by))
    return Sample(at_s, msgspec.convert(told, Cluster), counted)


def test_rates_are_between_two_looks() -> None:
    seen = view([sample(1, 10.0), sample(3, 12.0)])
    worker, silent = seen.workers
    assert (worker.tokens_per_s, worker.prompt_tokens_per_s) == (40, 400)
    assert (worker.step_ms, worker.blocks_in_per_s) == (pytest.approx(15), 7)
    assert (worker.kv_used, worker.kv_cached, worker.prefix_hits) == (0.5, 0.6, 0.75)
    assert (worker.running, worker.waiting, worker.state) == (3, 1, "both")
    assert (silent.state, silent.tokens_per_s) == ("silent", None)
    assert (seen.requests_per_s, seen.refused_per_s, seen.failed_per_s) == (10, 4, 2)
    assert seen.tokens_per_s == 50
    assert seen.requests == {"queued": 2, "decoding": 3}
    assert seen.services == {"frontend-0": "up", "tokenizer-0": "draining"}
    assert (seen.ttft_ms.p50, seen.ttft_ms.p95) == (pytest.approx(100), pytest.approx(190))


def test_one_look_has_no_rates() -> None:
    seen = view([sample(3, 10.0)])
    assert seen.workers[0].tokens_per_s is None and seen.requests_per_s is None
    assert seen.ttft_ms.p50 is None
    assert seen.workers[0].step_ms == pytest.approx(15), "since its start"


def test_a_worker_that_began_anew_is_not_held_against_its_past() -> None:
    again = fake_server.cluster(5)["workers"]
    again[0] = {**again[0], "epoch": "18"}
    seen = view([sample(2, 10.0), sample(5, 11.0, workers=again)])
    assert seen.workers[0].tokens_per_s is None and seen.workers[0].blocks_in_per_s is None


def test_a_frontend_that_began_anew_has_no_negative_rate() -> None:
    seen = view([sample(5, 10.0), sample(2, 11.0)])
    assert seen.tokens_per_s is None and seen.requests_per_s is None
    assert seen.ttft_ms.p50 is None


def test_another_frontend_counts_for_itself() -> None:
    """Behind an ingress each page may be another one's."""
    other = {**fake_server.cluster(9)["frontend"], "node_id": "frontend-1"}
    seen = view([sample(1, 10.0), sample(9, 11.0, frontend=other)])
    assert seen.tokens_per_s is None and seen.ttft_ms.p50 is not None
    seen = view([sample(1, 10.0), sample(9, 11.0, "frontend-1")])
    assert seen.tokens_per_s is not None and seen.ttft_ms.p50 is None
    assert (seen.refused_per_s, seen.failed_per_s) == (None, None)
    turns = [sample(1, 10.0, "frontend-1"), sample(9, 11.0), sample(3, 12.0, "frontend-1")]
    assert view(turns).refused_per_s == 4


def test_rates_are_of_the_last_seconds() -> None:
    samples = [sample(1, 0.0), sample(100, 100.0), sample(101, 104.0)]
    assert view(samples).tokens_per_s == 12.5


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.floats(0.01, 1))
def test_a_quantile_lies_between_the_edges_of_its_bucket(counts: list[int], share: float) -> None:
    edges = [float(n + 1) for n in range(len(counts) - 1)] + [float("inf")]
    total, buckets = 0, {}
    for edge, count in zip(edges, counts, strict=True):
        total += count
        buckets[edge] = float(total)
    if not total:
        return
    found = quantile(buckets, share)
    assert 0 <= found <= edges[-2]
    below = sum(count for edge, count in zip(edges, counts, strict=True) if edge < found)
    assert below <= share * total + 1e-6


def test_it_fits_80_columns() -> None:
    seen = view([sample(1, 10.0), sample(1000, 11.0)])
    lines = table(seen, "http://127.0.0.1:8000", 80)
    assert max(map(len, lines)) <= 80
    assert lines[0] == "fake-1b at http://127.0.0.1:8000: ready"
    assert "##...  50%" in lines[5]
    assert lines[6].startswith("pre…g-name silent")
    wide = table(seen, "http://127.0.0.1:8000", 100)
    assert wide[6].startswith("prefill-0-of-a-long-name silent") and max(map(len, wide)) <= 100
    narrow = table(seen, "http://127.0.0.1:8000", 20)
    assert {len(line) for line in narrow} <= set(range(21)) and narrow[0].endswith("…")


def test_a_cluster_that_is_not_ready_says_why() -> None:
    seen = view([sample(1, 1.0, ready=False, reason="no worker for streams", requests=None)])
    assert seen.state == "no worker for streams"
    assert table(seen, "u", 80)[1].startswith("requests  none; -/s")


def test_once(fake: FakeServer, capsys: Capture) -> None:
    assert main(["top", "--url", fake.url, "--once", "--interval-s", "0.2"]) == 0
    out = capsys.readouterr().out
    assert out.count("WORKER") == 1 and fake.looks == 2 and "\x1b" not in out
    assert main(["top", "--url", fake.url, "--once", "--interval-s", "0.2", "--json"]) == 0
    seen = msgspec.json.decode(capsys.readouterr().out, type=View)
    assert seen.workers[0].tokens_per_s is not None


def test_nobody_is_there(capsys: Capture) -> None:
    assert main(["top", "--once", "--url", "http://127.0.0.1:9"]) == ExitCode.SETUP
    (line,) = capsys.readouterr().err.splitlines()
    assert "no server at http://127.0.0.1:9: Connection refused; start one" in line


def test_another_server_is_no_cluster(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_server, "cluster", lambda looks: {"hello": 1})
    assert main(["top", "--once", "--url", fake.url]) == ExitCode.FAILED


def test_in_a_terminal_it_redraws_and_q_ends_it(fake: FakeServer) -> None:
    terminal = Terminal("top", "--url", fake.url, "--interval-s", "0.2")
    try:
        terminal.until("decode-0", 3)
        assert terminal.raw.count("\x1b[?1049h") == 1 and "\x1b[2J" not in terminal.raw
        fake.fault = "silent"
        terminal.until("HTTP 503: no; trying again every 0.2 s")
        fake.fault = ""
        shown = terminal.text.count("fake-1b at")
        terminal.until("fake-1b at", shown + 2)
        terminal.type("q")
        assert terminal.wait() == 0
        assert terminal.text and terminal.raw.endswith("\x1b[?25h\x1b[?1049l")
    finally:
        terminal.close()


def test_sigterm_gives_the_terminal_back(fake: FakeServer) -> None:
    terminal = Terminal("top", "--url", fake.url, "--interval-s", "30")
    try:
        terminal.until("decode-0")
        terminal.process.terminate()
        assert terminal.wait() == 0
        assert terminal.text and terminal.raw.endswith("\x1b[?1049l")
    finally:
        terminal.close()
