"""A service's view of the cluster: says Hello to the scheduler, keeps what `Peers` tells."""

from collections.abc import Callable

import msgspec

from slipstream.core.machine import (
    Effect,
    Event,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.messages import (
    SCHEDULER,
    Hello,
    LiveRequest,
    ModelState,
    NodeInfo,
    Peers,
    WorkerInfo,
)
from slipstream.types import NodeId, Role

HELLO_TIMER = "hello"
HELLO_RETRY_S = 1.0
COOL_DOWN_S = 2.0
"""How long a peer that fell silent is passed over, if the scheduler still sees it."""


class Membership:
    """Pure part of every machine but the scheduler's. `live` lists what a worker has to report."""

    def __init__(self, node: NodeInfo, live: Callable[[], list[LiveRequest]] = list):
        self.node = node
        self.scheduler_up = False
        self.ready, self.reason = False, "no word from the scheduler"
        self.models: dict[str, ModelState] = {}
        """As the scheduler says."""
        self.nodes: dict[NodeId, NodeInfo] = {}
        self.index_stride = 1
        """Which blocks the index hears of; the scheduler's to say, for it asks."""
        self._live = live
        self._shunned_until_s: dict[NodeId, float] = {}

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Every machine passes every event through here first."""
        match event:
            case Started():
                return self._hello(now_s)
            case TimerFired(key) if key == HELLO_TIMER:
                return [] if self.scheduler_up else self._hello(now_s)
            case PeerUp(peer, _):
                self._shunned_until_s.pop(peer, None)
                if peer == SCHEDULER:
                    self.scheduler_up = True
                    return self._hello(now_s)
            case PeerDown(peer):
                self._shunned_until_s[peer] = now_s + COOL_DOWN_S
                if peer == SCHEDULER:
                    self.scheduler_up = False
                    return [SetTimer(HELLO_TIMER, now_s + HELLO_RETRY_S)]
            case Received(_, Peers() as peers):
                self._learn(peers)
        return []

    def alive(self, role: Role, now_s: float, model: str = "") -> list[NodeId]:
        """Nodes of a role that may be spoken to, in the order of their names; of a model, if one is
        named."""
        return sorted(
            node.node_id
            for node in self.nodes.values()
            if node.role == role
            and model in ("", node.model)
            and not node.draining
            and self._shunned_until_s.get(node.node_id, 0.0) <= now_s
        )

    def taking_part(self) -> list[NodeInfo]:
        """All but workers whose fingerprint is not their model's."""
        wanted = {model.name: model.fingerprint for model in self.models.values()}
        return [
            node
            for node in self.nodes.values()
            if node.worker is None
            or wanted.get(node.model) in (None, "", fingerprint_of(node.worker))
        ]

    def offer(self, worker: WorkerInfo, now_s: float) -> list[Effect]:
        """What this worker offers has changed."""
        self.node = msgspec.structs.replace(self.node, worker=worker)
        return self._hello(now_s)

    def drain(self, now_s: float) -> list[Effect]:
        self.node = msgspec.structs.replace(self.node, draining=True)
        return self._hello(now_s)

    def _hello(self, now_s: float) -> list[Effect]:
        return [
            Send(SCHEDULER, Hello(node=self.node, live=self._live())),
            SetTimer(HELLO_TIMER, now_s + HELLO_RETRY_S),
        ]

    def _learn(self, peers: Peers) -> None:
        self.ready, self.reason = peers.ready, peers.reason
        self.models = {model.name: model for model in peers.models}
        self.index_stride = peers.index_stride
        for node in peers.nodes:
            known = self.nodes.get(node.node_id)
            if known is None or node.epoch >= known.epoch:
                self.nodes[node.node_id] = node
        for node_id, epoch in peers.gone.items():
            known = self.nodes.get(node_id)
            if known is not None and known.epoch <= epoch:
                del self.nodes[node_id]


def fingerprint_of(worker: WorkerInfo) -> str:
    """Of its model."""
    return worker.kv_layout_id.partition("/")[0]
