"""Settings of `slipstream frontend`."""

from typing import Annotated, ClassVar, TypeAlias

from msgspec import Meta

from slipstream.config import (
    ByteSize,
    JournalTtl,
    MaxRequests,
    PortNumber,
    RecoveryWait,
    RedisUrl,
    ServiceConfig,
)
from slipstream.types import Role

ApiKeysFile: TypeAlias = Annotated[
    str,
    Meta(
        description="File of API keys (slipstream keys api): requests need one of them; empty: "
        "nobody is asked. It may change at any time."
    ),
]
RoutesFile: TypeAlias = Annotated[
    str,
    Meta(
        description="File of other names for models, with weights, and of shadow traffic; empty: "
        "none. It may change at any time."
    ),
]
LoraUpdates: TypeAlias = Annotated[
    bool,
    Meta(
        description="LoRA adapters may be loaded and unloaded over HTTP; with API keys by an "
        "operator's."
    ),
]
AuditLog: TypeAlias = Annotated[
    str,
    Meta(
        description="File for a line of JSON about each request, without its text; several "
        "frontends may have the same; empty: none."
    ),
]
StallTimeout: TypeAlias = Annotated[
    float,
    Meta(
        ge=0,
        le=86_400,
        description="Longest silence between two tokens of an answer before it ends in an error; "
        "0: as long as its time budget.",
    ),
]


class FrontendConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP front door: OpenAI's API, limits, server-sent events."""

    role: ClassVar[Role] = Role.FRONTEND

    host: Annotated[str, Meta(min_length=1, description="Address for HTTP.")] = "127.0.0.1"
    port: Annotated[PortNumber, Meta(description="Port for HTTP; 0: any free one.")] = 8000
    routes_file: RoutesFile = ""
    allow_lora_updates: LoraUpdates = False
    api_keys_file: ApiKeysFile = ""
    audit_log: AuditLog = ""
    max_requests: MaxRequests = 1024
    max_body_bytes: Annotated[
        ByteSize, Meta(ge=1024, description="Longest request body; a longer one is answered 413.")
    ] = 8 * 2**20
    request_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="Time budget of a request, queueing included.")
    ] = 600.0
    stall_timeout_s: StallTimeout = 60.0
    max_choices: Annotated[
        int, Meta(ge=1, le=128, description="Highest n (choices of one request).")
    ] = 16
    response_store_bytes: Annotated[
        ByteSize, Meta(ge=0, description="Responses kept by /v1/responses; 0: none.")
    ] = 64 * 2**20
    response_keep_s: Annotated[
        float, Meta(gt=0, le=2_592_000, description="How long a response is kept.")
    ] = 3600.0
    redis_url: RedisUrl = ""
    journal_ttl_s: JournalTtl = 120.0
    keep_alive_s: Annotated[
        float, Meta(gt=0, le=3600, description="Silence in a stream before an SSE comment is sent.")
    ] = 10.0
    recovery_wait_s: RecoveryWait = 30.0
    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=3600, description="Wait for running requests at SIGTERM.")
    ] = 30.0
