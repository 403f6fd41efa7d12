"""Settings that services have in common: what they meet at, and how long they wait."""

from typing import Annotated, TypeAlias

from msgspec import Meta

RedisUrl: TypeAlias = Annotated[
    str,
    Meta(
        description="Redis of the index, of streamed answers and of usage: redis://host:port/0, "
        "rediss://, unix:///path, redis+sentinel://host:port,host:port/name/0 or "
        "redis+cluster://host:port,host:port.",
        extra={"secret": True},
    ),
]
JournalTtl: TypeAlias = Annotated[
    float,
    Meta(
        ge=0,
        le=3600,
        description="How long streamed answers stay in Redis, in seconds after their last piece, "
        "so that a client goes on at another frontend (Last-Event-ID); 0: they are not written.",
    ),
]
KeysDir: TypeAlias = Annotated[
    str,
    Meta(
        description="Folder of CURVE keys (slipstream keys make): the bus is encrypted, and lets "
        "in their holders alone; empty: none."
    ),
]
InsecureBus: TypeAlias = Annotated[
    bool, Meta(description="Listen where other hosts can come without keys.")
]
RecoveryWait: TypeAlias = Annotated[
    float,
    Meta(
        ge=0,
        le=3600,
        description="How long requests wait for a service that is away, before they end with 503.",
    ),
]
Watchdog: TypeAlias = Annotated[
    float,
    Meta(
        ge=0,
        le=3600,
        description="Seconds after which a process whose loop stands still is ended, to be started "
        "anew; 0: never.",
    ),
]
