"""Settings of what LoRA adapters may take of a worker."""

from typing import Annotated, TypeAlias

from msgspec import Meta

from slipstream.config.values import ByteSize

MaxLoras: TypeAlias = Annotated[
    int,
    Meta(ge=0, le=1024, description="LoRA adapters that a worker holds at a time; 0: none."),
]
MaxLoraRank: TypeAlias = Annotated[
    int, Meta(ge=1, le=512, description="Highest rank of a LoRA adapter.")
]
LoraBytes: TypeAlias = Annotated[
    ByteSize,
    Meta(
        description="Memory of a worker for all its LoRA adapters together; on a GPU it is left "
        "free by the KV blocks."
    ),
]
LoraDir: TypeAlias = Annotated[
    str,
    Meta(
        description="Folder in which LoRA adapters lie; others are refused, and paths may be "
        "relative to it; empty: they may lie anywhere."
    ),
]
