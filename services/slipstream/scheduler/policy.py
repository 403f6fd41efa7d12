"""Where a request runs: a pure function of what is known about the workers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slipstream.messages import WorkerInfo
from slipstream.types import BLOCK_TOKENS, NodeId, Role

RUNNING_TOKENS = 32
"""What a running stream costs a prompt beside it, as prompt tokens: a decode step goes over all
streams and delays each chunk. A round number between that and nothing; measured prices replace
it."""


@dataclass(slots=True)
class WorkerView:
    """One worker with what the scheduler has given it, which counts at once."""

    node_id: NodeId
    role: Role
    worker: WorkerInfo
    assigned: int = 0
    """Requests of which it may hold something."""
    queued_tokens: int = 0
    """Uncached tokens of prompts that it has been given and not finished."""
    blocks: int = 0
    """Blocks that its requests hold or will, shared ones counted for each."""

    @property
    def prefills(self) -> bool:
        return self.worker.prefill_budget_tokens > 0

    def admits(self, num_blocks: int) -> bool:
        """Whether one more request may go there now. An idle worker takes what fits it at all."""
        if self.assigned == 0:
            return True
        full = self.assigned >= self.worker.max_num_seqs
        return not full and self.blocks + num_blocks <= self.worker.num_blocks


@dataclass(slots=True, frozen=True)
class Placement:
    decode: NodeId
    prefill: NodeId | None = None
    """None: the decode worker computes the prompt itself."""


@dataclass(slots=True, frozen=True)
class Demand:
    """What placement knows about a request."""

    num_tokens: int
    num_blocks: int
    hints: Mapping[NodeId, int]

    def uncached(self, node_id: NodeId) -> int:
        """Tokens to compute there, if the index is right; at least the last one."""
        return max(1, self.num_tokens - self.hints.get(node_id, 0) * BLOCK_TOKENS)


def place(demand: Demand, workers: Iterable[WorkerView], disaggregated: bool) -> Placement | None:
    """The pair, or the one worker, that has the first token soonest; None: nobody has room.

    With `disaggregated` a prompt goes through a prefill worker as long as one lives; when none
    does, the decode workers do it all.
    """
    views = sorted(workers, key=lambda view: view.node_id)
    hosts = [view for view in views if view.worker.accept_decode]
    if disaggregated:
        pairs = [
            (source, target)
            for source in views
            if source.role is Role.PREFILL and source.prefills
            for target in hosts
            if target is not source and target.worker.kv_layout_id == source.worker.kv_layout_id
        ]
        if pairs:
            return _best_pair(demand, pairs)
    alone = [view for view in hosts if view.prefills and view.admits(demand.num_blocks)]
    if not alone:
        return None
    best = min(alone, key=lambda view: _prompt_cost(demand, view))
    return Placement(best.node_id)


def _best_pair(demand: Demand, pairs: list[tuple[WorkerView, WorkerView]]) -> Placement | None:
    free = [
        (source, target)
        for source, target in pairs
        if source.admits(demand.num_blocks) and target.admits(demand.num_blocks)
    ]
    if not free:
        return None
    source, target = min(
        free, key=lambda pair: (_prompt_cost(demand, pair[0]), _stream_cost(demand, pair[1]))
    )
    return Placement(target.node_id, source.node_id)


def _prompt_cost(demand: Demand, view: WorkerView) -> tuple[int, int]:
    tokens = view.queued_tokens + demand.uncached(view.node_id)
    return tokens + RUNNING_TOKENS * view.assigned, view.assigned


def _stream_cost(demand: Demand, view: WorkerView) -> tuple[int, int]:
    """Least streams first: they share its steps. Among equals, who has most of it already."""
    return view.assigned, demand.uncached(view.node_id)
