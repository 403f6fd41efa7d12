"""Settings of what a worker computes with, and of what it computes there."""

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

LoadFormat: TypeAlias = Annotated[
    Literal["auto", "dummy"],
    Meta(
        description="auto: safetensors; dummy: random weights, the same in every worker, made from "
        "config.json alone, to measure a model without its files."
    ),
]
Device: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^((auto|cuda)(:[0-9]{1,2})?|cpu)$",
        description="What computes: cpu; cuda:1, that GPU; cuda, the first one (of serve: all of "
        "them, workers in turn); auto: a GPU if there is one that torch can use.",
    ),
]
GpuMemoryShare: TypeAlias = Annotated[
    float,
    Meta(
        ge=0,
        le=1,
        description="Part of its GPU's memory that one worker may fill, weights and all; "
        "0: 0.9 (of serve: divided among the workers of that GPU).",
    ),
]
TensorParallelSize: TypeAlias = Annotated[
    int,
    Meta(
        ge=1,
        le=16,
        description="Processes that hold one worker's model between them, each on a GPU of its own "
        "from --device on; both sides of a hand-over have as many.",
    ),
]
