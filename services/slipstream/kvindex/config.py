"""Settings of `slipstream kvindex`."""

from typing import Annotated, ClassVar

from msgspec import Meta

from slipstream.config import RedisUrl, ServiceConfig
from slipstream.types import Role


class KvIndexConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The global prefix index: block events in, hints out, kept in Redis."""

    role: ClassVar[Role] = Role.KVINDEX

    redis_url: RedisUrl = "redis://127.0.0.1:6379/0"
    redis_timeout_s: Annotated[
        float, Meta(gt=0, le=60, description="Longest wait for one answer of Redis.")
    ] = 1.0
    worker_ttl_s: Annotated[
        float,
        Meta(ge=3, le=3600, description="Lifetime of a worker's entries; renewed every second."),
    ] = 30.0
    resync_s: Annotated[
        float,
        Meta(
            ge=0,
            le=86_400,
            description="How often each worker is asked for all that it holds, to mend what Redis "
            "lost or made up; 0: only when something is amiss.",
        ),
    ] = 300.0
