"""Transport `cuda_ipc`: pools on GPUs of one host. One handle for each pool, exported once.

Memory that somebody has opened outlives its owner, so that it can be read says nothing: a life of a
peer is judged by its epoch. That a handle leads to the peer's memory and not to something else is
shown by its card, a second allocation that holds a nonce which the peer tells beside the handle.
"""

import base64
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from slipstream.kv import device
from slipstream.kv.cuda_driver import CudaError
from slipstream.kv.device import Copy, DeviceBlocks, Lane
from slipstream.kv.digest import block_digests
from slipstream.kv.transport import Digests, PeerPool, Read, TransferError, check_read, pool_of
from slipstream.messages import NodeInfo
from slipstream.types import Epoch, NodeId

_LOG = logging.getLogger(__name__)

CARD_BYTES = 32


class Driver(device.Driver, Protocol):
    """With what moves between processes."""

    def allocate(self, content: bytes) -> int: ...
    def export(self, pointer: int) -> bytes: ...
    def open(self, handle: bytes) -> int: ...
    def shut(self, pointer: int) -> None: ...
    def gpu_of(self, pointer: int) -> int: ...


class _Address(msgspec.Struct, frozen=True, array_like=True):
    host: str
    pool: bytes
    card: bytes
    nonce: bytes


class _Peer(NamedTuple):
    epoch: Epoch
    told: PeerPool
    pool: int
    gpu: int
    """Where it lies. From another GPU the driver copies, which asks no multiprocessor of ours."""


class CudaIpcTransport:
    """Reads on the caller's thread, on a stream of its own. No peer takes part; none can hang."""

    name = "cuda_ipc"

    def __init__(self, driver: Driver, pool: DeviceBlocks, host: str):
        """`driver`: of a stream of our own. `pool`: an allocation of its own. `host`: as in our
        `NodeInfo`. CudaError: the pool cannot be exported."""
        self._driver, self._lane, self._host = driver, Lane(driver), host
        self._block_bytes = pool.shape[1]
        nonce = secrets.token_bytes(CARD_BYTES)
        card = driver.export(driver.allocate(nonce))
        address = _Address(host, driver.export(pool.pointer), card, nonce)
        self._address = base64.b64encode(msgspec.msgpack.encode(address)).decode()
        self._peers: dict[NodeId, _Peer] = {}
        self._lock = threading.Lock()
        """Held while the stream is used: a peer's memory is not let go under a copy."""
        self._closed = False

    def advertise(self) -> str:
        return self._address

    def connect(self, peer: NodeInfo) -> None:
        with self._lock:
            known = self._peers.get(peer.node_id)
            self._check_open()
            if known is not None and known.epoch == peer.epoch:
                return
            self._shut(peer.node_id)
            try:
                self._peers[peer.node_id] = self._open(peer)
            except CudaError as error:
                raise TransferError("attach", f"{peer.node_id}: {error}") from None

    def read(self, read: Read) -> None:
        try:
            with self._lock:
                result: Digests | TransferError = self._copy(read)
        except TransferError as error:
            result = error
        except CudaError as error:
            result = TransferError("device", str(error))
        read.done(result)

    def forget(self, node_id: NodeId) -> None:
        with self._lock:
            self._shut(node_id)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for node_id in list(self._peers):
                self._shut(node_id)

    def _open(self, peer: NodeInfo) -> _Peer:
        told = pool_of(peer, self.name, self._block_bytes)
        try:
            packed = base64.b64decode(told.address, validate=True)
            address = msgspec.msgpack.decode(packed, type=_Address)
        except ValueError as error:  # DecodeError is one
            raise TransferError("attach", f"{peer.node_id}: {error}") from None
        if address.host != self._host:
            raise TransferError("attach", f"{peer.node_id} is on another host")
        card = self._driver.open(address.card)
        try:
            found = np.zeros(CARD_BYTES, np.uint8)
            self._lane.carry_out([(int(found.ctypes.data), card, CARD_BYTES)])
        finally:
            self._driver.shut(card)
        if found.tobytes() != address.nonce:
            raise TransferError("attach", f"{peer.node_id}: the handle leads to other memory")
        pool = self._driver.open(address.pool)
        return _Peer(peer.epoch, told, pool, self._driver.gpu_of(pool))

    def _shut(self, node_id: NodeId) -> None:
        peer = self._peers.pop(node_id, None)
        if peer is not None:
            try:
                self._driver.shut(peer.pool)
            except CudaError as error:
                _LOG.info("memory of %s: %s", node_id, error)

    def _check_open(self) -> None:
        if self._closed:
            raise TransferError("closed")
        if self._lane.lost is not None:
            raise TransferError("device", f"is lost: {self._lane.lost}")

    def _copy(self, read: Read) -> Digests:
        self._check_open()
        peer = self._peers.get(read.peer.node_id)
        if peer is None or peer.epoch != read.peer.epoch:
            raise TransferError("epoch", f"{read.peer.node_id} is not attached")
        check_read(read, peer.told)
        into, size = read.into, self._block_bytes
        if isinstance(into, DeviceBlocks) and into.kernels is not None and peer.gpu == into.gpu:
            words = peer.pool, peer.told.num_blocks, read.source_blocks
            return into.kernels.copy(*words, into, read.local_blocks, read.verify)
        base = into.pointer if isinstance(into, DeviceBlocks) else int(into.ctypes.data)
        self._lane.carry_out(_runs(peer.pool, read.source_blocks, base, read.local_blocks, size))
        return block_digests(into, read.local_blocks) if read.verify else ()


def _runs(
    theirs: int, sources: Sequence[int], ours: int, locals_: Sequence[int], size: int
) -> Iterator[Copy]:
    """One copy for blocks that follow each other on both sides: each costs a call."""
    first, count = 0, len(sources)
    for end in range(1, count + 1):
        along = end < count and all(x[end] == x[end - 1] + 1 for x in (sources, locals_))
        if not along:
            target, source = ours + locals_[first] * size, theirs + sources[first] * size
            yield target, source, (end - first) * size
            first = end
