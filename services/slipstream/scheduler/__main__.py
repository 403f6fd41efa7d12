"""`slipstream scheduler`."""

import math

import msgspec

from slipstream.messages import SCHEDULER, NodeInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.shell import run_service
from slipstream.scheduler.config import SchedulerConfig
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.settings import SchedulerSettings


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
        max_request_timeout_s=config.max_request_timeout_s,
        ttft_target_s=config.ttft_target_s or math.inf,
        locate_timeout_s=config.locate_timeout_s,
        recovery_grace_s=config.recovery_grace_s,
        max_migrations=config.max_migrations,
        index_stride=config.index_stride,
    )
    return run_service(config, node, SchedulerMachine(node, settings))
