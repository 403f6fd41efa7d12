"""How KV blocks come from a peer's pool into ours: the protocol, and the choice for each peer."""

import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from slipstream.messages import NodeInfo
from slipstream.types import BlockId, Epoch, NodeId

_LOG = logging.getLogger(__name__)


class TransferError(Exception):
    """A READ that did not happen. `cause` is one word from a closed set, for counting."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


class Transport(Protocol):
    """One way to move blocks. Methods may be called from several threads at a time.

    Blocks move as bytes while their owner may write into them: leases and digests, not the
    transport, tell whether what came is what was meant. Nothing is tried twice in here.
    """

    name: str

    def advertise(self) -> str:
        """How peers reach this worker's pool."""
        ...

    def connect(self, peer: NodeInfo) -> None:
        """Prepare to read from this process. TransferError: this way does not lead there."""
        ...

    def read(
        self,
        peer: NodeInfo,
        source_blocks: Sequence[BlockId],
        local_blocks: Sequence[BlockId],
        timeout_s: float,
    ) -> None:
        """Copy the peer's blocks into the local ones; blocks the calling thread.

        When it returns or raises, nobody writes into the local blocks any more. TransferError: the
        local bytes are worthless.
        """
        ...

    def forget(self, node_id: NodeId) -> None:
        """Let go of what belongs to the peer. Running READs are not disturbed."""
        ...

    def close(self) -> None:
        """End running READs and serve nobody any more. Idempotent."""
        ...


class _Choice(NamedTuple):
    epoch: Epoch
    transport: Transport


class Transports:
    """The transports of one worker, best first, and which of them serves which peer."""

    def __init__(
        self, transports: Sequence[Transport], kv_layout_id: str, block_bytes: int, host: str
    ):
        """`host`: as in our own `NodeInfo`; a detour to a peer on the same host is worth a
        warning."""
        self._transports = tuple(transports)
        self._kv_layout_id, self._block_bytes, self._host = kv_layout_id, block_bytes, host
        self._choices: dict[NodeId, _Choice] = {}
        self._lock = threading.Lock()

    def advertise(self) -> dict[str, str]:
        """For `WorkerInfo.transports`."""
        return {transport.name: transport.advertise() for transport in self._transports}

    @property
    def peers(self) -> dict[NodeId, Epoch]:
        """Those to which something is kept open."""
        with self._lock:
            return {node_id: choice.epoch for node_id, choice in self._choices.items()}

    def choose(self, peer: NodeInfo) -> Transport:
        """The first transport that both sides have and that leads there; decided once an epoch.

        TransferError `layout`: its blocks mean something else. `transport`: there is none.
        """
        with self._lock:
            known = self._choices.get(peer.node_id)
            if known is not None and known.epoch == peer.epoch:
                return known.transport
        if known is not None:
            self.forget(peer.node_id)
        transport = self._connect(peer)
        with self._lock:
            self._choices[peer.node_id] = _Choice(peer.epoch, transport)
        _LOG.info("KV blocks of %s come by %s", peer.node_id, transport.name)
        return transport

    def forget(self, node_id: NodeId) -> None:
        with self._lock:
            self._choices.pop(node_id, None)
        for transport in self._transports:
            transport.forget(node_id)

    def close(self) -> None:
        for transport in self._transports:
            transport.close()

    def _connect(self, peer: NodeInfo) -> Transport:
        worker = peer.worker
        if worker is None:
            raise TransferError("transport", f"{peer.node_id} is no worker")
        ours = (self._kv_layout_id, self._block_bytes)
        if (worker.kv_layout_id, worker.block_bytes) != ours:
            raise TransferError("layout", f"{peer.node_id} has {worker.kv_layout_id}")
        for transport in self._transports:
            if transport.name not in worker.transports:
                continue
            try:
                transport.connect(peer)
            except TransferError as error:
                level = logging.WARNING if peer.host == self._host else logging.INFO
                _LOG.log(level, "SLOW: no %s from %s: %s", transport.name, peer.node_id, error)
                continue
            return transport
        raise TransferError("transport", f"no way to {peer.node_id} that both sides have")
