"""Transport `cuda_ipc`: pools on GPUs of one host. One handle for each pool, exported once.

Memory that somebody has opened outlives its owner, so that it can be read says nothing: a life of a
peer is judged by its epoch. That a handle leads to the peer's memory and not to something else is
shown by its card, a second allocation that holds a nonce which the peer tells beside the handle.
"""

import base64
import logging
import secrets
import threading
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from slipstream.kernels.verified_copy import digests
from slipstream.kv.cuda_driver import CudaError
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import Digests, PeerPool, Read, TransferError, check_read, pool_of
from slipstream.messages import NodeInfo
from slipstream.types import Epoch, NodeId

_LOG = logging.getLogger(__name__)

CARD_BYTES = 32
STAGING_BYTES = 4 << 20
"""Read back at a time for the digests, unless a single block is larger."""


class Driver(Protocol):
    """`cuda_driver.CudaDriver`, or its stand-in in tests. Raises CudaError."""

    def allocate(self, content: bytes) -> int: ...
    def export(self, pointer: int) -> bytes: ...
    def open(self, handle: bytes) -> int: ...
    def shut(self, pointer: int) -> None: ...
    def copy(self, target: int, source: int, num_bytes: int) -> None: ...
    def wait(self) -> None: ...


class DevicePool(NamedTuple):
    """A pool in device memory."""

    pointer: int
    """Of an allocation that begins here."""
    name: Blocks
    """What a `Read` has as `into` when it means this pool; only its shape is looked at."""


class _Address(msgspec.Struct, frozen=True, array_like=True):
    host: str
    pool: bytes
    card: bytes
    nonce: bytes


class _Peer(NamedTuple):
    epoch: Epoch
    told: PeerPool
    pool: int


class CudaIpcTransport:
    """Reads on the caller's thread, on a stream of its own. No peer takes part; none can hang."""

    name = "cuda_ipc"

    def __init__(self, driver: Driver, pool: DevicePool, host: str):
        """`host`: as in our `NodeInfo`. CudaError: the pool cannot be exported."""
        self._driver, self._pool, self._host = driver, pool, host
        nonce = secrets.token_bytes(CARD_BYTES)
        card = driver.export(driver.allocate(nonce))
        address = _Address(host, driver.export(pool.pointer), card, nonce)
        self._address = base64.b64encode(msgspec.msgpack.encode(address)).decode()
        self._peers: dict[NodeId, _Peer] = {}
        self._lock = threading.Lock()
        """Held while the stream is used: a peer's memory is not let go under a copy."""
        self._closed = False
        self._lost: CudaError | None = None
        """The device's last word: nobody can say what becomes of copies."""

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
        told = pool_of(peer, self.name, int(self._pool.name.shape[1]))
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
            self._carry_out([(int(found.ctypes.data), card, CARD_BYTES)])
        finally:
            self._driver.shut(card)
        if found.tobytes() != address.nonce:
            raise TransferError("attach", f"{peer.node_id}: the handle leads to other memory")
        return _Peer(peer.epoch, told, self._driver.open(address.pool))

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
        if self._lost is not None:
            raise TransferError("device", f"is lost: {self._lost}")

    def _copy(self, read: Read) -> Digests:
        self._check_open()
        peer = self._peers.get(read.peer.node_id)
        if peer is None or peer.epoch != read.peer.epoch:
            raise TransferError("epoch", f"{read.peer.node_id} is not attached")
        check_read(read, peer.told)
        here = read.into is self._pool.name
        base = self._pool.pointer if here else int(read.into.ctypes.data)
        size = int(read.into.shape[1])
        pairs = zip(read.source_blocks, read.local_blocks, strict=True)
        self._carry_out((base + b * size, peer.pool + a * size, size) for a, b in pairs)
        if not read.verify:
            return ()
        return self._digests(read) if here else digests(read.into, read.local_blocks)

    def _digests(self, read: Read) -> Digests:
        """Of the device's blocks as stored, read back: the link to the host sets the pace."""
        size = int(read.into.shape[1])
        step = max(1, STAGING_BYTES // size)
        staging = np.empty((step, size), np.uint8)
        here, there = int(staging.ctypes.data), self._pool.pointer
        made: list[bytes] = []
        for start in range(0, len(read.local_blocks), step):
            part = read.local_blocks[start : start + step]
            self._carry_out((here + i * size, there + b * size, size) for i, b in enumerate(part))
            made += digests(staging, range(len(part)))
        return tuple(made)

    def _carry_out(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copies (target, source, bytes) to their end. Whatever goes wrong meanwhile, nothing is
        being copied any more when this returns: targets are given to others then.

        CudaError: some of it was not copied. A device that cannot even say when it is at rest
        computes nothing further for this process, by CUDA's rules, and is not asked again.
        """
        try:
            for target, source, num_bytes in copies:
                self._driver.copy(target, source, num_bytes)
        finally:
            try:
                self._driver.wait()
            except CudaError as error:
                self._lost = error
                raise
