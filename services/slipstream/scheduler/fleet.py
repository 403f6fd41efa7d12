"""Who is there: every process that said Hello in a session that still stands."""

import math

from slipstream.core.load import gauges_of
from slipstream.core.machine import Effect, Send
from slipstream.messages import ClusterLoad, Hello, NodeInfo, Peers, WorkerLoad
from slipstream.types import Epoch, NodeId, Role

GONE_MAX = 1024


class Fleet:
    """Owns the membership of the cluster and tells everybody about it."""

    def __init__(self, index_stride: int = 1) -> None:
        self.index_stride = index_stride
        self.nodes: dict[NodeId, NodeInfo] = {}
        self.loads: dict[NodeId, WorkerLoad] = {}
        self._loaded_s: dict[NodeId, float] = {}
        self._gone: dict[NodeId, Epoch] = {}
        self._model: str = ""
        """Fingerprint of the first worker's model: workers with another one take no part."""

    def hello(self, source: NodeId, hello: Hello) -> bool:
        """Note who speaks; whether it is its first word in this session."""
        first = source not in self.nodes
        self.nodes[source] = hello.node
        self._gone.pop(source, None)
        self._model = self._model or _fingerprint(hello.node)
        return first

    def down(self, peer: NodeId) -> NodeInfo | None:
        node = self.nodes.pop(peer, None)
        self.loads.pop(peer, None)
        self._loaded_s.pop(peer, None)
        if node is not None:
            self._gone[peer] = node.epoch
            if len(self._gone) > GONE_MAX:
                del self._gone[next(iter(self._gone))]
            left = [_fingerprint(other) for other in self.nodes.values() if other.worker]
            if self._model not in left:
                self._model = left[0] if left else ""
        return node

    def loaded(self, source: NodeId, load: WorkerLoad, now_s: float) -> None:
        self.loads[source], self._loaded_s[source] = load, now_s

    def heard_s(self, worker: NodeId) -> float:
        """When it reported last; infinity if it has not yet."""
        return self._loaded_s.get(worker, math.inf)

    def of_role(self, role: Role) -> list[NodeId]:
        """Nodes that take something new, in the order of their names."""
        return sorted(n.node_id for n in self.nodes.values() if n.role is role and not n.draining)

    def workers(self) -> list[NodeInfo]:
        """Workers of the cluster's model that take something new."""
        nodes = self.nodes.values()
        same = [node for node in nodes if node.worker and _fingerprint(node) == self._model]
        return [node for node in same if not node.draining]

    def largest_pool_blocks(self) -> int:
        """0 without workers."""
        return max((n.worker.num_blocks for n in self.workers() if n.worker is not None), default=0)

    def missing(self) -> str:
        """What a request would wait for; empty if it can be served now."""
        workers = [node.worker for node in self.workers() if node.worker is not None]
        prefillers = [worker for worker in workers if worker.prefill_budget_tokens > 0]
        layouts = {worker.kv_layout_id for worker in workers if worker.accept_decode}
        if not layouts:
            return "no decode worker"
        if not any(worker.kv_layout_id in layouts for worker in prefillers):
            return "no worker that computes prompts"
        if not self.of_role(Role.TOKENIZER):
            return "no tokenizer"
        return ""

    def tell_load(self, own: dict[NodeId, dict[str, float]]) -> list[Effect]:
        """`own` gauges and the last word of each worker about itself, to every frontend."""
        loads = self.loads.items()
        load = ClusterLoad(
            gauges=own | {node_id: gauges_of(load) for node_id, load in loads},
            blocks_from={n: load.blocks_from for n, load in loads if load.blocks_from},
        )
        return [Send(node, load) for node in self.of_role(Role.FRONTEND)]

    def announce(self) -> list[Effect]:
        """Tell everybody who is there."""
        reason = self.missing()
        peers = Peers(
            nodes=list(self.nodes.values()),
            gone=dict(self._gone),
            ready=not reason,
            reason=reason,
            index_stride=self.index_stride,
        )
        return [Send(node_id, peers) for node_id in sorted(self.nodes)]


def _fingerprint(node: NodeInfo) -> str:
    """What a worker serves; empty for any other service."""
    return node.worker.kv_layout_id.partition("/")[0] if node.worker is not None else ""
