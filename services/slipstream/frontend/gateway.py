"""What the HTTP handlers need from the process around them."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import msgspec

from slipstream.core.machine import DeliverCodec, Taken
from slipstream.errors import Problem
from slipstream.frontend.cluster import Cluster
from slipstream.messages import NodeInfo, Prompt, TextDelta, Tokenize, TraceFound
from slipstream.spans import TraceContext


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One name that may be asked for."""

    name: str
    max_model_len: int
    root: str
    """The model itself: another name for an alias; where an adapter was read."""
    parent: str | None = None
    """Of an adapter: the model that it is for."""
    reason: str = ""
    """Why it cannot be served now."""


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the frontend knows at this moment about the cluster, or about one of its models."""

    ready: bool
    draining: bool = False
    reason: str = ""
    """What is missing, in words, while not ready."""
    refuses: str = ""
    """The same, if it has been missing for so long that requests are not taken any more."""
    model: str = ""
    """Who answers to the name that was asked for; empty: nobody. Without a name: the first of all
    models."""
    name: str = ""
    """What the answer says: the model, or its adapter."""
    adapter: str = ""
    """Whose weights are added to the model's, by its id."""
    max_model_len: int = 0
    vocab_size: int = 0
    sampling: dict[str, float] = {}
    """What the model's makers recommend where a client says nothing."""
    models: list[ModelCard] = []
    """All that may be asked for."""
    nodes: list[NodeInfo] = []
    retry_after_s: float = 1.0
    running: int = 0
    waiting: int = 0


StreamItem: TypeAlias = int | TextDelta | Problem
"""The number of prompt tokens; a piece of the answer; the end without one."""


class Gateway(Protocol):
    def status(self, name: str = "", key: str = "") -> ClusterStatus:
        """With a `name`: of the model that answers to it. `key`: of a call; the same one has the
        same share of an alias."""
        ...

    def open(
        self,
        submission: Tokenize,
        put: Callable[[StreamItem], None],
        context: TraceContext,
        model: str,
        taken: Taken | None = None,
    ) -> Callable[[], None]:
        """Never refuses: a refusal is the first item. `put` is told every item, on the loop, after
        this has returned; a `Problem`, or a delta with a finish reason, is the last one.

        Call what it returns when you are done with the answer, finished or not; twice is no harm.
        """
        ...

    async def codec(self, prompt: Prompt | None, tokens: bytes, model: str) -> DeliverCodec: ...

    async def trace(self, name: str) -> TraceFound | None:
        """None: the scheduler does not answer."""
        ...

    async def adapter(self, model: str, name: str, path: str, replace: bool) -> Problem | None:
        """A LoRA adapter comes, or without a path goes, everywhere. None: so it did."""
        ...

    def cluster(self) -> Cluster: ...

    def metrics(self) -> bytes:
        """Prometheus text."""
        ...
