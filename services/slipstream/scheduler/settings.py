"""What the scheduler's machine is told once."""

import math

import msgspec

from slipstream.scheduler.policy import Disaggregation, Policy


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    policy: Policy = "cost"
    disaggregation: Disaggregation = "auto"
    max_requests: int = 1024
    max_queued_tokens: int = 4 * 2**20
    max_request_timeout_s: float = 3600.0
    ttft_target_s: float = math.inf
    """Nothing is begun whose first token is expected later; see `admission.too_late`."""
    locate_timeout_s: float = 0.05
    recovery_grace_s: float = 2.0
    recovery_wait_s: float = 30.0
    """How long what is queued waits for a worker where there is none."""
    max_migrations: int = 3
    index_stride: int = 1
