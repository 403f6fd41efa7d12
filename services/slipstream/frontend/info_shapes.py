"""Answers of the paths that generate nothing, as far as they are ours alone."""

import msgspec


class Alive(msgspec.Struct, kw_only=True):
    status: str = "alive"


class Version(msgspec.Struct, kw_only=True):
    version: str


class Index(msgspec.Struct, kw_only=True):
    name: str = "slipstream"
    version: str
    links: list[str]


class WorkerOut(msgspec.Struct, kw_only=True):
    num_blocks: int
    block_bytes: int
    transports: dict[str, str]
    quantization: str


class NodeOut(msgspec.Struct, kw_only=True):
    node_id: str
    role: str
    epoch: int
    worker: WorkerOut | None


class ModelOut(msgspec.Struct, kw_only=True):
    name: str
    ready: bool
    reason: str
    """What is missing."""


class Readiness(msgspec.Struct, kw_only=True):
    """With 200 if a request can be served now, else with 503: one for some model, or for the one
    that `?model=` names."""

    status: str
    """ready, not_ready or draining."""
    reason: str
    """What is missing."""
    model: str
    max_model_len: int
    models: list[ModelOut]
    nodes: list[NodeOut]
