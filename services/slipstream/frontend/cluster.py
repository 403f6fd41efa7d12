"""GET /cluster: workers, queue, blocks and what moved between pools, as the frontend knows them.

Put together when it is asked for, from what the scheduler says once a second; requests pay nothing.
Totals count from the process's start: who wants rates asks twice.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from slipstream.messages import SCHEDULER, ClusterLoad, NodeInfo
from slipstream.types import NodeId

if TYPE_CHECKING:
    from slipstream.frontend.gateway import ClusterStatus

STATES = (
    *("recovering", "locating", "queued", "probation", "resuming"),
    *("prefilling", "decoding", "finishing"),
)
"""The scheduler's, of a request."""
PLACEMENTS = ("alone", "apart", "fetching")
_TRANSFER = re.compile(
    r"transfer_([a-z_]+?)_(?:(reads|bytes|seconds)_total|failures_.+_total|gbps)"
)

Gauges = Mapping[str, float]


class Blocks(msgspec.Struct, kw_only=True):
    """Of a pool: free + used + leased; the cached ones are used."""

    free: int
    used: int
    cached: int
    leased: int


class Transport(msgspec.Struct, kw_only=True):
    """One way by which a worker has read blocks of others."""

    reads_total: int = 0
    bytes_total: int = 0
    seconds_total: float = 0.0
    failures_total: int = 0
    gbps: float | None = None
    """As measured when peers became known."""


class Load(msgspec.Struct, kw_only=True):
    """What a worker said of itself last."""

    running: int
    waiting: int
    waiting_tokens: int
    steps_total: int
    step_seconds_total: float
    blocks: Blocks
    blocks_from: dict[NodeId, int]
    """Blocks read, by source; under its own name those from its tiers."""
    transports: dict[str, Transport]
    prefix_hit_tokens_total: int
    prefix_query_tokens_total: int
    preemptions_total: int


class Worker(msgspec.Struct, kw_only=True):
    node_id: NodeId
    role: str
    model: str
    epoch: str
    """A start time in ns: too large for a number of JavaScript."""
    host: str
    device: str
    draining: bool
    computes_prompts: bool
    accepts_streams: bool
    shifted: bool
    """Its role is not what its settings say."""
    num_blocks: int
    block_bytes: int
    load: Load | None
    """None until it has reported."""


class Model(msgspec.Struct, kw_only=True):
    """One name that may be asked for."""

    name: str
    max_model_len: int
    parent: str | None
    """Of a LoRA adapter: the model that it is for."""
    reason: str
    """Why it cannot be served now."""


class Service(msgspec.Struct, kw_only=True):
    node_id: NodeId
    role: str
    draining: bool


class Requests(msgspec.Struct, kw_only=True):
    """The scheduler's account."""

    states: dict[str, int]
    accepted_total: int
    ended_total: int
    migrated_total: int
    placed_total: dict[str, int]
    role_shifts_total: int
    ttft_prediction_error_median: float


class Frontend(msgspec.Struct, kw_only=True):
    """The one that was asked, as of now."""

    node_id: NodeId
    requests_live: int
    tokens_total: int


class Cluster(msgspec.Struct, kw_only=True):
    ready: bool
    draining: bool
    reason: str
    model: str
    max_model_len: int
    models: list[Model]
    workers: list[Worker]
    services: list[Service]
    requests: Requests | None
    """None until the scheduler has reported."""
    frontend: Frontend


def cluster(status: "ClusterStatus", load: ClusterLoad, node_id: NodeId, own: Gauges) -> Cluster:
    """`own`: statistics of this frontend, whose name is `node_id`."""
    nodes = sorted(status.nodes, key=lambda node: node.node_id)
    scheduler = load.gauges.get(SCHEDULER)
    return Cluster(
        ready=status.ready,
        draining=status.draining,
        reason=status.reason,
        model=status.model,
        max_model_len=status.max_model_len,
        models=[
            Model(
                name=card.name,
                max_model_len=card.max_model_len,
                parent=card.parent,
                reason=card.reason,
            )
            for card in status.models
        ],
        workers=[_worker(node, load) for node in nodes if node.worker is not None],
        services=[
            Service(node_id=node.node_id, role=node.role.value, draining=node.draining)
            for node in nodes
            if node.worker is None
        ],
        requests=None if scheduler is None else _requests(scheduler),
        frontend=Frontend(
            node_id=node_id,
            requests_live=_count(own, "requests_live"),
            tokens_total=_count(own, "tokens_total"),
        ),
    )


def _count(gauges: Gauges, name: str) -> int:
    return int(gauges.get(name, 0))


def _worker(node: NodeInfo, load: ClusterLoad) -> Worker:
    offered, gauges = node.worker, load.gauges.get(node.node_id)
    assert offered is not None
    return Worker(
        node_id=node.node_id,
        role=node.role.value,
        model=node.model,
        epoch=str(node.epoch),
        host=node.host,
        device=offered.device,
        draining=node.draining,
        computes_prompts=offered.prefill_budget_tokens > 0,
        accepts_streams=offered.accept_decode,
        shifted=offered.shifted,
        num_blocks=offered.num_blocks,
        block_bytes=offered.block_bytes,
        load=None if gauges is None else _load(gauges, load.blocks_from.get(node.node_id, {})),
    )


def _load(gauges: Gauges, blocks_from: Mapping[NodeId, int]) -> Load:
    return Load(
        running=_count(gauges, "running"),
        waiting=_count(gauges, "waiting"),
        waiting_tokens=_count(gauges, "waiting_tokens"),
        steps_total=_count(gauges, "steps"),
        step_seconds_total=gauges.get("step_seconds_total", 0.0),
        blocks=Blocks(
            free=_count(gauges, "blocks_free"),
            used=_count(gauges, "blocks_used"),
            cached=_count(gauges, "blocks_cached"),
            leased=_count(gauges, "blocks_leased"),
        ),
        blocks_from=dict(blocks_from),
        transports=_transports(gauges),
        prefix_hit_tokens_total=_count(gauges, "prefix_hit_tokens_total"),
        prefix_query_tokens_total=_count(gauges, "prefix_query_tokens_total"),
        preemptions_total=_count(gauges, "preemptions_total"),
    )


def _transports(gauges: Gauges) -> dict[str, Transport]:
    found: dict[str, Transport] = {}
    for name, value in gauges.items():
        match = _TRANSFER.fullmatch(name)
        if match is None:
            continue
        transport = found.setdefault(match[1], Transport())
        match match[2]:
            case "reads":
                transport.reads_total = int(value)
            case "bytes":
                transport.bytes_total = int(value)
            case "seconds":
                transport.seconds_total = value
            case _ if name.endswith("_gbps"):
                transport.gbps = value
            case _:
                transport.failures_total += int(value)
    return found


def _requests(gauges: Gauges) -> Requests:
    return Requests(
        states={state: _count(gauges, f"requests_{state}") for state in STATES},
        accepted_total=_count(gauges, "requests_accepted_total"),
        ended_total=_count(gauges, "requests_ended_total"),
        migrated_total=_count(gauges, "requests_migrated_total"),
        placed_total={name: _count(gauges, f"requests_placed_{name}_total") for name in PLACEMENTS},
        role_shifts_total=_count(gauges, "role_shifts_total"),
        ttft_prediction_error_median=gauges.get("ttft_prediction_error_median", 0.0),
    )
