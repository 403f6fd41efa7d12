"""Small clusters and traces."""

from collections.abc import Sequence

import msgspec

from slipstream.simulate.cluster import LAYOUT_ID, Cluster, Run
from slipstream.simulate.driver import Limits
from slipstream.simulate.hardware import load_hardware
from slipstream.simulate.prompts import Prompts
from slipstream.simulate.trace import TraceRequest

HARDWARE = msgspec.structs.replace(load_hardware("h200-8b"), kv_cache_tokens=200_000)


def a_run(**changes: object) -> Run:
    run = Run(
        policy="cost",
        disaggregation="auto",
        rate_scale=1.0,
        workers=2,
        prefill=0,
        hardware=HARDWARE,
        host_cache_tokens=0,
        offload_after_hits=1,
        limits=Limits(5.0, 0.05),
        timeout_s=600.0,
        max_requests=1024,
        bus_latency_s=2e-4,
    )
    return msgspec.structs.replace(run, **changes)


def a_cluster(run: Run, requests: Sequence[TraceRequest]) -> Cluster:
    return Cluster(run, requests, Prompts(run.hardware.vocab_size, LAYOUT_ID))


def played(run: Run, requests: Sequence[TraceRequest]) -> Cluster:
    cluster = a_cluster(run, requests)
    cluster.run()
    return cluster


def request(arrival_s: float, prompt_tokens: int, output_tokens: int, *chunks: int) -> TraceRequest:
    return TraceRequest(arrival_s, prompt_tokens, output_tokens, chunks)
