"""Settings of `slipstream scheduler`."""

from typing import Annotated, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from msgspec import Meta

from slipstream.config import MaxRequests, RecoveryWait, ServiceConfig
from slipstream.types import Role

Disaggregation: TypeAlias = Annotated[
    Literal["auto", "always", "never"],
    Meta(
        description="auto: what is cheaper for each prompt; always: every prompt goes through a "
        "prefill worker and a transfer; never: each worker does both."
    ),
]
Policy: TypeAlias = Annotated[
    Literal["cost", "prefix", "load", "random", "round-robin"],
    Meta(
        description="How workers are chosen. cost: by predicted seconds; the others are there to "
        "compare it with: longest cached prefix, least load, chance, in turn."
    ),
]
OtlpEndpoint: TypeAlias = Annotated[
    str,
    Meta(
        description="OpenTelemetry collector (OTLP over HTTP) that gets the spans of all services: "
        "http://host:4318; empty: none."
    ),
]
MaxQueuedTokens: TypeAlias = Annotated[
    int,
    Meta(
        ge=1,
        le=2**40,
        description="Most prompt tokens in the scheduler's queue; above it: 429. One prompt is "
        "taken, however long.",
    ),
]
TtftTarget: TypeAlias = Annotated[
    float,
    Meta(
        ge=0,
        le=3600,
        description="A request whose first token is predicted later than this is refused with "
        "429 before any work; one that takes long by itself may take twice as long. 0: never.",
    ),
]


class SchedulerConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner of every request: admits, places, times out, retries, reports."""

    role: ClassVar[Role] = Role.SCHEDULER

    disaggregation: Disaggregation = "auto"
    policy: Policy = "cost"
    max_requests: MaxRequests = 1024
    max_queued_tokens: MaxQueuedTokens = 4 * 2**20
    max_request_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="Longest time budget a request may ask for.")
    ] = 3600.0
    ttft_target_s: TtftTarget = 30.0
    locate_timeout_s: Annotated[
        float, Meta(ge=0, le=60, description="Wait for the index before placing by load alone.")
    ] = 0.05
    recovery_grace_s: Annotated[
        float, Meta(ge=0, le=600, description="After a start: wait for the workers' reports.")
    ] = 2.0
    recovery_wait_s: RecoveryWait = 30.0
    max_migrations: Annotated[
        int, Meta(ge=0, le=100, description="Workers that may fail a request before it ends.")
    ] = 3
    index_stride: Annotated[
        int, Meta(ge=1, le=1024, description="Of a prompt every n-th block is in the index.")
    ] = 1
    otlp_endpoint: OtlpEndpoint = ""

    def __post_init__(self) -> None:
        check_otlp_endpoint(self.otlp_endpoint)


def check_otlp_endpoint(url: str) -> None:
    """ValueError if it is none. Secrets have no place in it: other users see command lines."""
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--otlp-endpoint {url}: expected http://host:port")
    if parts.username is not None or parts.query:
        raise ValueError("--otlp-endpoint: no user, password or query in it")
