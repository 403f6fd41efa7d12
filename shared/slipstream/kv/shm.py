"""Transport `shm`: peers on one host map each other's segments and copy."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slipstream.kv.segment import Blocks, Segment, SegmentError, SegmentHeader, attach_segment
from slipstream.kv.transport import TransferError
from slipstream.messages import NodeInfo
from slipstream.types import BlockId, NodeId


class ShmTransport:
    """Reads by memory copy. A copy cannot hang, so there is no deadline to keep."""

    name = "shm"

    def __init__(self, segment: Segment):
        self._path = segment.path
        self._blocks = segment.blocks
        self._attached: dict[NodeId, tuple[int, Blocks]] = {}
        self._lock = threading.Lock()

    def advertise(self) -> str:
        return str(self._path)

    def connect(self, peer: NodeInfo) -> None:
        """Maps the peer's segment. That its header is right proves that the host is the same."""
        worker = peer.worker
        if worker is None:
            raise TransferError("attach", f"{peer.node_id} is no worker")
        expected = SegmentHeader(
            kv_layout_id=worker.kv_layout_id,
            epoch=peer.epoch,
            num_blocks=worker.num_blocks,
            block_bytes=worker.block_bytes,
        )
        try:
            blocks = attach_segment(Path(worker.transports[self.name]), expected)
        except SegmentError as error:
            raise TransferError("attach", str(error)) from None
        with self._lock:
            self._attached[peer.node_id] = (peer.epoch, blocks)

    def read(
        self,
        peer: NodeInfo,
        source_blocks: Sequence[BlockId],
        local_blocks: Sequence[BlockId],
        timeout_s: float,
    ) -> None:
        with self._lock:
            epoch, blocks = self._attached.get(peer.node_id, (0, self._blocks[:0]))
        if epoch != peer.epoch:
            raise TransferError("epoch", f"{peer.node_id} is not attached")
        if not all(0 <= block < len(blocks) for block in source_blocks):
            raise TransferError("range", f"{peer.node_id} has {len(blocks)} blocks")
        for source, local in zip(source_blocks, local_blocks, strict=True):
            np.copyto(self._blocks[local], blocks[source])

    def forget(self, node_id: NodeId) -> None:
        with self._lock:
            self._attached.pop(node_id, None)

    def close(self) -> None:
        with self._lock:
            self._attached.clear()
