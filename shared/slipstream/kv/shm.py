"""Transport `shm`: peers on one host map each other's segments and copy."""

import threading
from pathlib import Path

from slipstream.kernels.verified_copy import verified_copy
from slipstream.kv.segment import Blocks, Segment, SegmentError, SegmentHeader, attach_segment
from slipstream.kv.transport import Digests, Read, TransferError, check_range
from slipstream.messages import NodeInfo
from slipstream.types import NodeId


class ShmTransport:
    """Reads by memory copy, on the caller's thread. A copy cannot hang, so no deadline is kept."""

    name = "shm"

    def __init__(self, segment: Segment):
        self._path = segment.path
        self._attached: dict[NodeId, tuple[int, Blocks]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def advertise(self) -> str:
        return str(self._path)

    def connect(self, peer: NodeInfo) -> None:
        """Maps the peer's segment. That its header is right proves that the host is the same."""
        worker = peer.worker
        if worker is None:
            raise TransferError("attach", f"{peer.node_id} is no worker")
        with self._lock:
            if self._attached.get(peer.node_id, (0,))[0] == peer.epoch:
                return
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
            if self._closed:
                raise TransferError("closed")
            self._attached[peer.node_id] = (peer.epoch, blocks)

    def read(self, read: Read) -> None:
        try:
            result: Digests | TransferError = self._copy(read)
        except TransferError as error:
            result = error
        read.done(result)

    def forget(self, node_id: NodeId) -> None:
        with self._lock:
            self._attached.pop(node_id, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._attached.clear()

    def _copy(self, read: Read) -> Digests:
        with self._lock:
            if self._closed:
                raise TransferError("closed")
            epoch, blocks = self._attached.get(read.peer.node_id, (0, read.into))
        if epoch != read.peer.epoch:
            raise TransferError("epoch", f"{read.peer.node_id} is not attached")
        check_range(read)
        return verified_copy(blocks, read.source_blocks, read.into, read.local_blocks, read.verify)
