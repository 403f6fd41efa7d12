"""Several runs: the search for a rate, processes beside each other, and the numbers they give."""

import math
import signal
import statistics
import subprocess
import sys
import time

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.builders import a_run, played, request
from slipstream.simulate.driver import Limits
from slipstream.simulate.report import Percentiles, summarize, table
from slipstream.simulate.runs import (
    RATE_FACTOR_MAX,
    RATE_TOLERANCE,
    Source,
    Task,
    highest_rate,
    perform,
    perform_all,
)
from slipstream.simulate.synthetic import synthetic_trace


@given(st.floats(-6, 6), st.floats(-2, 2))
def test_the_highest_rate_is_found_from_anywhere(log_limit: float, log_first: float) -> None:
    limit = 10**log_limit
    tried: list[float] = []

    def enough(scale: float) -> bool:
        tried.append(scale)
        return scale <= limit

    first = 10**log_first
    found = highest_rate(enough, first)
    if found is None:
        assert limit < first / RATE_FACTOR_MAX * 2
    elif found < first * RATE_FACTOR_MAX:
        assert found <= limit < found * RATE_TOLERANCE
    assert len(tried) <= 2 * math.log2(RATE_FACTOR_MAX)


def a_task(find_rate: bool = False, **changes: object) -> Task:
    source = Source(trace="", synthetic=60, requests=0, duration_s=0.0, stamped=False, seed=2)
    return Task(source=source, run=a_run(**changes), good_share=0.9, find_rate=find_rate)


def test_the_search_ends_at_a_rate_that_is_enough() -> None:
    limits = Limits(0.4, 0.05)
    found = perform(a_task(find_rate=True, limits=limits, workers=1))
    assert found.good_share >= 0.9 and not found.stopped_early
    more = perform(a_task(limits=limits, workers=1, rate_scale=found.rate_scale * 1.1))
    assert more.good_share < 0.9


def test_without_any_rate_that_is_enough_the_lowest_is_shown() -> None:
    found = perform(a_task(find_rate=True, limits=Limits(1e-9, 1.0)))
    assert found.good_share < 0.9 and found.rate_scale == 1 / RATE_FACTOR_MAX


def test_processes_give_what_one_gives_and_in_order() -> None:
    tasks = [a_task(rate_scale=scale) for scale in (8.0, 1.0, 4.0)]

    def clockless(jobs: int) -> list[object]:
        return [
            msgspec.structs.replace(summary, wall_s=0.0, placement_s=Percentiles())
            for summary in perform_all(tasks, jobs)
        ]

    beside = clockless(2)
    assert [summary.rate_scale for summary in beside] == [8.0, 1.0, 4.0]
    assert beside == clockless(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_its_runs(number: signal.Signals) -> None:
    words = ("simulate", "--synthetic", "100000", "--rate-scale", "1,2", "--jobs", "2")
    with subprocess.Popen(
        [sys.executable, "-m", "slipstream.cli.main", *words],
        stderr=subprocess.PIPE,
        # Where the tests run in a shell's background, it is ignored, and so it would be there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        process = psutil.Process(command.pid)
        while len(process.children()) < 2:
            time.sleep(0.05)
        children = process.children()
        assert command.stderr is not None and command.stderr.readline()
        command.send_signal(number)
        assert command.wait(20) == (130 if number is signal.SIGINT else -number)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
        assert not command.stderr.read()


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=200))
def test_percentiles(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = Percentiles.of(values)
    assert [found.p50, found.p90, found.p99] == pytest.approx([cuts[49], cuts[89], cuts[98]])
    assert found.mean == pytest.approx(statistics.fmean(values))


def test_no_values_no_percentiles() -> None:
    assert Percentiles.of([]) == Percentiles(0.0, 0.0, 0.0, 0.0)
    assert Percentiles.of([2.5]) == Percentiles(2.5, 2.5, 2.5, 2.5)


def test_the_summary_adds_up() -> None:
    requests = synthetic_trace(60, 8)
    cluster = played(a_run(rate_scale=4.0, workers=3), requests)
    found = summarize(cluster, 1.5)
    workers = found.workers.values()
    assert sum(w.query_tokens for w in workers) == sum(r.prompt_tokens for r in requests)
    computed = sum(w.prefill_tokens for w in workers) + sum(w.decode_rows for w in workers)
    wanted = sum(r.prompt_tokens + r.output_tokens - 1 for r in requests)
    assert computed == wanted - sum(w.hit_tokens for w in workers)
    assert found.placements == 60 and found.completed == 60
    assert found.goodput_per_s == pytest.approx(60 * found.good_share / found.elapsed_s)
    busy = [w.busy_share for w in workers]
    assert all(0 < share <= 1 for share in busy)
    work = [process.work_s for process in cluster.processes if process.busy_s]
    assert found.imbalance == pytest.approx(max(work) / statistics.fmean(work))


def test_the_table_has_a_line_for_each_run() -> None:
    found = summarize(played(a_run(), [request(0.0, 100, 3, 1)]), 0.0)
    lines = table([found, msgspec.structs.replace(found, rate_scale=2.5)]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {23}
    assert " 2.5 |" in lines[3]
