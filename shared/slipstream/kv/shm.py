"""Transport `shm`: peers on one host map each other's segments and copy."""

import threading
from pathlib import Path
from typing import NamedTuple

from slipstream.kernels.verified_copy import verified_copy
from slipstream.kv.device import DeviceBlocks
from slipstream.kv.segment import Blocks, Segment, SegmentError, SegmentHeader, attach_segment
from slipstream.kv.transport import Digests, PeerPool, Read, TransferError, check_read, pool_of
from slipstream.messages import NodeInfo
from slipstream.types import Epoch, NodeId


class _Attached(NamedTuple):
    epoch: Epoch
    told: PeerPool
    blocks: Blocks


class ShmTransport:
    """Reads by memory copy, on the caller's thread. A copy cannot hang, so no deadline is kept."""

    name = "shm"

    def __init__(self, segment: Segment):
        self._path, words = segment.path, segment.header
        self._kv_layout_id, self._block_bytes = words.kv_layout_id, words.block_bytes
        self._attached: dict[NodeId, _Attached] = {}
        self._lock = threading.Lock()
        self._closed = False

    def advertise(self) -> str:
        return str(self._path)

    def connect(self, peer: NodeInfo) -> None:
        """Maps the peer's segment. That its header is right proves that the host is the same."""
        pool = pool_of(peer, self.name, self._block_bytes)
        with self._lock:
            known = self._attached.get(peer.node_id)
            if known is not None and known.epoch == peer.epoch:
                return
        expected = SegmentHeader(
            kv_layout_id=self._kv_layout_id,
            epoch=peer.epoch,
            num_blocks=pool.num_blocks,
            block_bytes=pool.block_bytes,
        )
        try:
            blocks = attach_segment(Path(pool.address), expected)
        except SegmentError as error:
            raise TransferError("attach", str(error)) from None
        with self._lock:
            if self._closed:
                raise TransferError("closed")
            self._attached[peer.node_id] = _Attached(peer.epoch, pool, blocks)

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
            peer = self._attached.get(read.peer.node_id)
        if peer is None or peer.epoch != read.peer.epoch:
            raise TransferError("epoch", f"{read.peer.node_id} is not attached")
        check_read(read, peer.told)
        assert not isinstance(read.into, DeviceBlocks), "pools on GPUs do without this transport"
        return verified_copy(
            peer.blocks, read.source_blocks, read.into, read.local_blocks, read.verify
        )
