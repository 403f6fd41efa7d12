"""What a worker's machine is told at its start."""

import msgspec


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    eos_token_ids: tuple[int, ...] = ()
    lease_s: float = 10.0
    renew_s: float = 2.0
    pull_timeout_s: float = 10.0
    step_timeout_s: float = 10.0
    stuck_s: float = 120.0
    """How long after its time a READ may hang, until nothing but a new process helps."""
    enable_prefix_caching: bool = True
    offload_after_hits: int | None = None
    """None: there are no tiers below the pool."""
    steps_in_flight: int = 1
    """2: the next one is planned while one runs."""
    draft_tokens: int = 0
    """At most so many are proposed to a stream in a step."""
    kv_events: bool = False
    """Emit `PublishKvEvents`."""
