"""Runs, one after the other or in processes beside each other, and the search for a rate."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import msgspec

from slipstream.config import SetupError
from slipstream.simulate.cluster import LAYOUT_ID, Cluster, Run
from slipstream.simulate.prompts import Prompts
from slipstream.simulate.report import Summary, summarize
from slipstream.simulate.synthetic import synthetic_trace
from slipstream.simulate.trace import TraceRequest, cut, read_trace, spread

RATE_TOLERANCE = 1.02
"""The search ends when what is too much is no more than so many times what is not."""
RATE_FACTOR_MAX = 1024.0


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the requests come from; small, so that it can be sent to another process."""

    trace: str
    synthetic: int
    requests: int
    duration_s: float
    stamped: bool
    seed: int


class Task(msgspec.Struct, frozen=True, kw_only=True):
    source: Source
    run: Run
    good_share: float
    find_rate: bool


@cache
def requests_of(source: Source) -> list[TraceRequest]:
    """SetupError: the trace cannot be used."""
    if source.synthetic:
        drawn = synthetic_trace(source.synthetic, source.seed)
        return cut(drawn, source.requests, source.duration_s)
    try:
        requests = read_trace(Path(source.trace))
    except SetupError as error:
        raise SetupError(f"slipstream simulate: --trace: {error}") from None
    if not source.stamped:
        requests = spread(requests, source.seed)
    return cut(requests, source.requests, source.duration_s)


@cache
def _prompts(vocab_size: int) -> Prompts:
    """Its chains of hashes serve every run of this process."""
    return Prompts(vocab_size, LAYOUT_ID)


def perform(task: Task) -> Summary:
    """One run; with `find_rate` the one at the highest rate that is low enough, or if there is
    none, at the lowest tried."""
    if not task.find_rate:
        return _once(task, task.run.rate_scale)
    late_max = int((1 - task.good_share) * len(requests_of(task.source)))
    tried: dict[float, Summary] = {}

    def enough(rate_scale: float) -> bool:
        tried[rate_scale] = summary = _once(task, rate_scale, late_max)
        return not summary.stopped_early and summary.good_share >= task.good_share

    found = highest_rate(enough, task.run.rate_scale)
    return tried[min(tried) if found is None else found]


def _once(task: Task, rate_scale: float, late_max: int | None = None) -> Summary:
    run = msgspec.structs.replace(task.run, rate_scale=rate_scale)
    cluster = Cluster(run, requests_of(task.source), _prompts(run.hardware.vocab_size))
    begin_s = time.monotonic()
    cluster.run(late_max)
    return summarize(cluster, time.monotonic() - begin_s)


def highest_rate(enough: Callable[[float], bool], first: float) -> float | None:
    """Doubles or halves until one rate is enough and the next is not, then bisects their ratio.

    None: no rate within `RATE_FACTOR_MAX` of the first is enough.
    """
    low = high = first
    if enough(first):
        while enough(high := low * 2):
            low = high
            if low >= first * RATE_FACTOR_MAX:
                return low
    else:
        while not enough(low := high / 2):
            high = low
            if high <= first / RATE_FACTOR_MAX:
                return None
    while high / low > RATE_TOLERANCE:
        middle = math.sqrt(low * high)
        if enough(middle):
            low = middle
        else:
            high = middle
    return low


def perform_all(tasks: Sequence[Task], jobs: int) -> Iterator[Summary]:
    """In the order of the tasks. Each process reads the trace once and keeps its hashes."""
    jobs = min(len(tasks), jobs or os.cpu_count() or 1)
    if jobs == 1:
        yield from map(perform, tasks)
        return
    pool = ProcessPoolExecutor(jobs, initializer=_live_with_parent)
    try:
        yield from pool.map(perform, tasks)
    except BaseException:  # Ctrl-C too: nobody waits for runs that nobody will see
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _live_with_parent() -> None:
    """A run lasts minutes: whatever ends the command ends the runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
