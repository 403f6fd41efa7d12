"""Who is there: every process that said Hello in a session that still stands."""

import math
from collections.abc import Mapping

from slipstream.core.load import gauges_of
from slipstream.core.machine import Effect, Send
from slipstream.core.membership import fingerprint_of
from slipstream.messages import (
    AdapterInfo,
    ClusterLoad,
    Hello,
    ModelState,
    NodeInfo,
    Peers,
    WorkerLoad,
)
from slipstream.types import Epoch, NodeId, Role

GONE_MAX = 1024
NOBODY = "no decode worker"


class Fleet:
    """Owns the membership of the cluster and tells everybody about it."""

    def __init__(self, index_stride: int = 1) -> None:
        self.index_stride = index_stride
        self.nodes: dict[NodeId, NodeInfo] = {}
        self.loads: dict[NodeId, WorkerLoad] = {}
        self.adapters: dict[str, list[AdapterInfo]] = {}
        """By model, those that may be asked for."""
        self._loaded_s: dict[NodeId, float] = {}
        self._gone: dict[NodeId, Epoch] = {}
        self._fingerprints: dict[str, str] = {}
        """Model -> that of its first worker: workers with another one under the same name take no
        part."""

    def hello(self, source: NodeId, hello: Hello) -> bool:
        """Note who speaks; whether it is its first word in this session."""
        first = source not in self.nodes
        self.nodes[source] = hello.node
        self._gone.pop(source, None)
        self._choose()
        return first

    def down(self, peer: NodeId) -> NodeInfo | None:
        node = self.nodes.pop(peer, None)
        self.loads.pop(peer, None)
        self._loaded_s.pop(peer, None)
        if node is not None:
            self._gone[peer] = node.epoch
            if len(self._gone) > GONE_MAX:
                del self._gone[next(iter(self._gone))]
            self._choose()
        return node

    def _choose(self) -> None:
        """What each model is, as long as somebody who says so is there."""
        said: dict[str, list[str]] = {}
        for node in self.nodes.values():
            if node.worker is not None:
                said.setdefault(node.model, []).append(fingerprint_of(node.worker))
        known = self._fingerprints
        self._fingerprints = {
            model: known[model] if known.get(model) in prints else prints[0]
            for model, prints in said.items()
        }

    def loaded(self, source: NodeId, load: WorkerLoad, now_s: float) -> None:
        self.loads[source], self._loaded_s[source] = load, now_s

    def heard_s(self, worker: NodeId) -> float:
        """When it reported last; infinity if it has not yet."""
        return self._loaded_s.get(worker, math.inf)

    def of_role(self, role: Role) -> list[NodeId]:
        """Nodes that take something new, in the order of their names."""
        return sorted(n.node_id for n in self.nodes.values() if n.role is role and not n.draining)

    def models(self) -> list[str]:
        """What is served, or would be if nothing was missing."""
        return sorted({node.model for node in self.nodes.values() if node.model})

    def workers(self, model: str) -> list[NodeInfo]:
        """Workers of a model that take something new."""
        fingerprint = self._fingerprints.get(model)
        nodes = [node for node in self.nodes.values() if node.model == model and not node.draining]
        return [
            n for n in nodes if n.worker is not None and fingerprint_of(n.worker) == fingerprint
        ]

    def largest_pool_blocks(self, model: str) -> int:
        """Of what a request can be given: one to compute its prompt, one for its stream. 0 without
        workers."""
        offered = [node.worker for node in self.workers(model) if node.worker is not None]
        hosts = [worker.num_blocks for worker in offered if worker.accept_decode]
        sources = [worker.num_blocks for worker in offered if worker.prefill_budget_tokens > 0]
        return min(max(hosts, default=0), max(sources, default=0))

    def missing(self, model: str) -> str:
        """What a request for it would wait for; empty if it can be served now."""
        workers = [node.worker for node in self.workers(model) if node.worker is not None]
        prefillers = [worker for worker in workers if worker.prefill_budget_tokens > 0]
        layouts = {worker.kv_layout_id for worker in workers if worker.accept_decode}
        if not layouts:
            return NOBODY
        if not any(worker.kv_layout_id in layouts for worker in prefillers):
            return "no worker that computes prompts"
        tokenizers = self.of_role(Role.TOKENIZER)
        if not any(self.nodes[node_id].model == model for node_id in tokenizers):
            return "no tokenizer"
        return ""

    def tell_load(
        self, own: dict[NodeId, dict[str, float]], requests: Mapping[str, Mapping[str, int]]
    ) -> list[Effect]:
        """`own` gauges, the `requests` of each model, and the last word of each worker about
        itself, to every frontend."""
        loads = self.loads.items()
        load = ClusterLoad(
            gauges=own | {node_id: gauges_of(load) for node_id, load in loads},
            blocks_from={n: load.blocks_from for n, load in loads if load.blocks_from},
            requests={model: dict(states) for model, states in requests.items()},
        )
        return [Send(node, load) for node in self.of_role(Role.FRONTEND)]

    def announce(self) -> list[Effect]:
        """Tell everybody who is there."""
        models = [
            ModelState(
                name=name,
                missing=self.missing(name),
                adapters=self.adapters.get(name, []),
                fingerprint=self._fingerprints.get(name, ""),
            )
            for name in self.models()
        ]
        ready = not all(model.missing for model in models)
        reasons = [model.missing for model in models] or [NOBODY]
        peers = Peers(
            nodes=list(self.nodes.values()),
            gone=dict(self._gone),
            ready=ready,
            reason="" if ready else reasons[0],
            models=models,
            index_stride=self.index_stride,
        )
        return [Send(node_id, peers) for node_id in sorted(self.nodes)]
