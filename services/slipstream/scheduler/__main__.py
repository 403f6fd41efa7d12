"""`slipstream scheduler`."""

import math

import msgspec

from slipstream.messages import SCHEDULER, NodeInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.shell import Executor, run_service
from slipstream.runtime.wall import wall_offset_ns
from slipstream.scheduler.config import SchedulerConfig
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.scheduler.spans import SchedulerSpans


def run(config: SchedulerConfig) -> int:
    # Others are born with this name; whatever else it is called is of no use to anybody.
    config = msgspec.structs.replace(config, node_id=SCHEDULER)
    node = NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=new_epoch(config),
        address=config.advertise,
        host=host_identity(),
    )
    settings = SchedulerSettings(
        policy=config.policy,
        disaggregation=config.disaggregation,
        max_requests=config.max_requests,
        max_queued_tokens=config.max_queued_tokens,
        max_request_timeout_s=config.max_request_timeout_s,
        ttft_target_s=config.ttft_target_s or math.inf,
        locate_timeout_s=config.locate_timeout_s,
        recovery_grace_s=config.recovery_grace_s,
        recovery_wait_s=config.recovery_wait_s,
        max_migrations=config.max_migrations,
        index_stride=config.index_stride,
    )
    machine = SchedulerMachine(node, settings)
    spans = SchedulerSpans(machine, wall_offset_ns, exports=bool(config.otlp_endpoint))
    return run_service(config, node, machine, _exporter(config.otlp_endpoint), spans=spans)


def _exporter(endpoint: str) -> Executor | None:
    """StartError if what it needs is not installed."""
    if not endpoint:
        return None
    from slipstream.scheduler.exporter import OtlpExporter  # aiohttp is slow to import

    return OtlpExporter(endpoint)
