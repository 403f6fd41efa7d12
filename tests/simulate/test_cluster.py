"""Whole runs of small traces: nothing is lost, everything is counted."""

import msgspec
import pytest

from simulate.builders import HARDWARE, a_cluster, a_run, played, request
from slipstream.simulate.cluster import Cluster
from slipstream.simulate.driver import Limits
from slipstream.simulate.report import summarize
from slipstream.simulate.synthetic import synthetic_trace

LAYOUTS = {
    "mixed": {"workers": 3},
    "apart": {"workers": 3, "prefill": 1, "disaggregation": "always"},
    "tight": {
        "workers": 2,
        "hardware": msgspec.structs.replace(HARDWARE, kv_cache_tokens=110_000, max_num_seqs=8),
    },
    "tiered": {
        "workers": 2,
        "hardware": msgspec.structs.replace(HARDWARE, kv_cache_tokens=110_000),
        "host_cache_tokens": 150_000,
        "offload_after_hits": 0,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(2))
def test_each_request_ends_once_with_its_output_length(layout: str, seed: int) -> None:
    requests = synthetic_trace(60, seed)
    cluster = played(a_run(**LAYOUTS[layout], rate_scale=20.0), requests)
    assert not cluster.driver.open
    for stream, asked in zip(cluster.driver.streams, requests, strict=True):
        assert not stream.problem
        assert stream.num_tokens == asked.output_tokens
        assert 0 < stream.first_s <= stream.last_s <= (stream.ended_s or 0)
    gaps = sum(asked.output_tokens - 1 for asked in requests)
    assert len(cluster.driver.gaps_s) == gaps
    assert all(gap > 0 for gap in cluster.driver.gaps_s)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_held_in_the_end(layout: str) -> None:
    cluster = played(a_run(**LAYOUTS[layout], rate_scale=20.0), synthetic_trace(60, 1))
    cluster.settle(1.0)
    for process in cluster.processes:
        process.machine.check()
    assert not cluster.scheduler.inner.requests
    for worker in cluster.workers.values():
        assert not worker.jobs and not worker.log.ended and not any(worker.pool.references)


def without_clock(cluster: Cluster) -> dict[str, object]:
    found = msgspec.to_builtins(summarize(cluster, 0.0))
    del found["placement_s"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_settings_give_equal_runs(layout: str) -> None:
    run = a_run(**LAYOUTS[layout], rate_scale=8.0)
    first, second = (played(run, synthetic_trace(50, 3)) for _ in range(2))
    assert without_clock(first) == without_clock(second)
    assert first.driver.gaps_s == second.driver.gaps_s
    assert without_clock(played(run, synthetic_trace(50, 4))) != without_clock(first)


THREE = [
    request(0.0, 1024, 4, 0, 1),  # 64 blocks, none there
    request(20.0, 1100, 4, 0, 1, 2),  # 68 blocks, the first 64 are there
    request(40.0, 1024, 4, 0, 1),  # all 64 are there, but the last token is computed: 63
    request(60.0, 1000, 4, 0, 3),  # 62 blocks, 32 are there
]


@pytest.mark.parametrize("layout", ["mixed", "apart"])
def test_hits_equal_a_count_by_hand(layout: str) -> None:
    """Far apart in time, the index sends each prompt to where its beginning is."""
    found = summarize(played(a_run(**LAYOUTS[layout]), THREE), 0.0)
    assert (found.hit_blocks, found.query_blocks) == (64 + 63 + 32, 64 + 68 + 64 + 62)
    assert found.reusable_share == found.hit_share


def test_a_cache_that_holds_one_prompt_hits_nothing_else() -> None:
    hardware = msgspec.structs.replace(HARDWARE, kv_cache_tokens=1200)
    run = a_run(workers=1, hardware=hardware)
    found = summarize(
        played(run, [THREE[0], request(20.0, 1024, 4, 7, 8), request(40.0, 1024, 4, 0, 1)]), 0.0
    )
    assert found.reusable_share > 0 and found.hit_blocks < 16


def test_what_left_the_pool_comes_back_from_host_memory() -> None:
    """The pool has 75 blocks; the second prompt leaves 10 of the first one's 64 there. A load takes
    half of the pool at most."""
    hardware = msgspec.structs.replace(HARDWARE, kv_cache_tokens=1200)
    again = [THREE[0], request(20.0, 1024, 4, 7, 8), request(40.0, 1024, 4, 0, 1)]
    for host_cache_tokens, loaded in ((0, 0), (1000, 0), (100_000, 37)):
        run = a_run(
            workers=1,
            hardware=hardware,
            host_cache_tokens=host_cache_tokens,
            offload_after_hits=0,
        )
        found = summarize(played(run, again), 0.0)
        assert (found.loaded_blocks, found.hit_blocks) == (loaded, 10 + loaded)


def test_a_faster_worker_has_lower_latencies() -> None:
    step = HARDWARE.step
    prices = {name: getattr(step, name) / 2 for name in step.__struct_fields__}
    faster = msgspec.structs.replace(HARDWARE, step=type(step)(**prices))
    requests = synthetic_trace(80, 5)
    slow, fast = (
        summarize(played(a_run(hardware=hardware, rate_scale=4.0), requests), 0.0)
        for hardware in (HARDWARE, faster)
    )
    for name in ("ttft_s", "itl_s", "e2e_s"):
        for point in ("p50", "p90", "p99", "mean"):
            assert getattr(getattr(fast, name), point) < getattr(getattr(slow, name), point)


def test_one_request_takes_what_the_prices_say() -> None:
    """1,024 tokens in one step, then three decodes; four messages before the first token is out."""
    run = a_run(bus_latency_s=0.001, workers=1)
    cluster = played(run, [request(0.0, 1024, 4, 0, 1)])
    (stream,) = cluster.driver.streams
    step = run.hardware.step
    prefill_s = step.base_s + 1024 * step.prefill_token_s + 1024**2 * step.prefill_pair_s
    decodes_s = [
        step.base_s + step.decode_row_s + (1024 + n) * step.decode_context_s for n in (1, 2, 3)
    ]
    locate_s = 2 * 0.001 + 3e-4
    assert stream.first_s == pytest.approx(3 * 0.001 + locate_s + prefill_s)
    assert list(cluster.driver.gaps_s) == pytest.approx(decodes_s)


def test_what_fits_nowhere_fails_and_is_not_good() -> None:
    hardware = msgspec.structs.replace(HARDWARE, kv_cache_tokens=1200)
    requests = [THREE[0], request(1.0, 3000, 4, *range(6)), THREE[2]]
    found = summarize(played(a_run(hardware=hardware), requests), 0.0)
    assert found.failed == {"context_length_exceeded": 1}
    assert found.completed == 2 and found.good_share == pytest.approx(2 / 3)


def test_limits_decide_what_is_good() -> None:
    requests = synthetic_trace(60, 6)
    cluster = played(a_run(rate_scale=20.0), requests)
    middle_s = sorted(stream.first_s for stream in cluster.driver.streams)[29]
    ones = sum(r.output_tokens == 1 for r in requests)
    for limits, missed in (
        (Limits(600.0, 600.0), (0, 0)),
        (Limits(middle_s, 600.0), (30, 0)),
        (Limits(600.0, 1e-6), (0, 60 - ones)),
    ):
        found = summarize(played(a_run(rate_scale=20.0, limits=limits), requests), 0.0)
        assert (found.missed_ttft, found.missed_itl) == missed
        assert found.good_share == pytest.approx(1 - sum(missed) / 60)


def test_a_run_can_stop_when_too_many_are_late() -> None:
    cluster = a_cluster(a_run(limits=Limits(1e-6, 1.0)), synthetic_trace(60, 7))
    cluster.run(late_max=5)
    assert cluster.driver.late == 6 and cluster.driver.open == 54
    assert summarize(cluster, 0.0).stopped_early
