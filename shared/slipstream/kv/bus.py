"""Transport `bus`: blocks over ZeroMQ sockets of their own. Works everywhere, needs nothing.

A reader asks for a few MiB at a time and has a few questions under way, so the server keeps no
state and queues no more than that for one reader. A reader's socket serves one READ at a time and
is closed after a failure: what comes late for a failed READ comes to nobody.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import zmq

from slipstream.config import StartError
from slipstream.config.service import IPC_PATH_BYTES
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import TransferError
from slipstream.messages import NodeInfo
from slipstream.types import BlockId, NodeId

_LOG = logging.getLogger(__name__)

REPLY_BYTES = 4 << 20
"""Block bytes in one reply, unless a single block is larger."""
WINDOW = 4
"""Questions under way for one READ."""
REQUEST_BYTES_MAX = 64 << 10
QUEUE_REPLIES = 64
IDLE_SOCKETS = 4
IN_USE = 5
"""Exit code where an address is taken."""


class ReadRequest(msgspec.Struct, frozen=True, array_like=True):
    """First question of a READ, and every later one: these blocks, if you are still `epoch`."""

    read_id: int
    part: int
    epoch: int
    blocks: list[int]


class ReadReply(msgspec.Struct, frozen=True, array_like=True):
    """Comes before the blocks, one frame each; with `error` there are none."""

    read_id: int
    part: int
    epoch: int
    error: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(ReadRequest).decode
_decode_reply = msgspec.msgpack.Decoder(ReadReply).decode


def blocks_per_reply(block_bytes: int) -> int:
    return max(1, REPLY_BYTES // block_bytes)


class BusServer:
    """Answers READs of this worker's pool from a thread of its own."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], bind: str, blocks: Blocks, epoch: int
    ):
        self.malformed = 0
        self._blocks, self._epoch = blocks, epoch
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES_MAX)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_REPLIES)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._socket.close()
            raise StartError(f"slipstream: KV socket {bind}: {error}", IN_USE) from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.path = Path(bind.removeprefix("ipc://")) if bind.startswith("ipc://") else None
        if self.path is not None:
            self.path.chmod(0o600)
        self._thread = threading.Thread(target=self._serve, name="kv-bus", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Ends with the context."""
        try:
            while True:
                frames = self._socket.recv_multipart()
                reply = self._answer(frames)
                if reply is not None:
                    # A reader that does not take its answers loses them, and nobody waits for it.
                    self._send([frames[0], *reply])
        except zmq.ContextTerminated:
            pass
        finally:
            self._socket.close()

    def _send(self, frames: list[bytes | memoryview]) -> None:
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            _LOG.warning("a reader of KV blocks does not take its answers")

    def _answer(self, frames: list[bytes]) -> list[bytes | memoryview] | None:
        try:
            _, payload = frames
            request = _decode_request(payload)
        except (ValueError, msgspec.DecodeError):
            self.malformed += 1
            return None
        error = self._refusal(request)
        head = _encode(ReadReply(request.read_id, request.part, self._epoch, error))
        return (
            [head]
            if error
            else [head, *(memoryview(self._blocks[block]) for block in request.blocks)]
        )

    def _refusal(self, request: ReadRequest) -> str:
        count, block_bytes = self._blocks.shape
        if request.epoch != self._epoch:
            return "epoch"
        if not all(0 <= block < count for block in request.blocks):
            return "range"
        if len(request.blocks) > blocks_per_reply(block_bytes):
            return "size"
        return ""


class BusTransport:
    """Serves our pool, reads those of others."""

    name = "bus"

    def __init__(self, blocks: Blocks, epoch: int, bind: str, advertise: str = ""):
        """`bind`: where to listen; a tcp port of `*` is chosen by the system. `advertise`: host
        that peers use where it is not the one of `bind`. StartError: the address is taken."""
        if bind.startswith("ipc://"):
            _check_free(bind.removeprefix("ipc://"))
        self._blocks = blocks
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._server = BusServer(self._context, bind, blocks, epoch)
        self._address = _advertised(self._server.endpoint, advertise)
        self._idle: dict[tuple[NodeId, int], list[zmq.Socket[bytes]]] = {}
        self._lock = threading.Lock()
        self._reads = 0
        self._closed = False

    @property
    def malformed(self) -> int:
        """Requests that could not be read."""
        return self._server.malformed

    def advertise(self) -> str:
        return self._address

    def connect(self, peer: NodeInfo) -> None:
        self._put(peer, self._take(peer))

    def read(
        self,
        peer: NodeInfo,
        source_blocks: Sequence[BlockId],
        local_blocks: Sequence[BlockId],
        timeout_s: float,
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._reads += 1
            read_id = self._reads
        connection = self._take(peer)
        try:
            _Read(self._blocks, peer.epoch, read_id, source_blocks, local_blocks).run(
                connection, deadline_s
            )
        except zmq.ZMQError as error:
            connection.close()
            closed = isinstance(error, zmq.ContextTerminated)
            raise TransferError("closed" if closed else "socket", str(error)) from None
        except BaseException:
            connection.close()
            raise
        self._put(peer, connection)

    def forget(self, node_id: NodeId) -> None:
        with self._lock:
            keys = [key for key in self._idle if key[0] == node_id]
            sockets = [connection for key in keys for connection in self._idle.pop(key)]
        for connection in sockets:
            connection.close()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sockets = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in sockets:
            connection.close()
        self._context.term()  # wakes the server and all readers, and waits until they are gone
        if self._server.path is not None:
            self._server.path.unlink(missing_ok=True)  # ZeroMQ leaves it behind

    def _take(self, peer: NodeInfo) -> "zmq.Socket[bytes]":
        """A connection that nobody uses; the taker puts it back or closes it."""
        with self._lock:
            if self._closed:
                raise TransferError("closed")
            idle = self._idle.get((peer.node_id, peer.epoch))
            if idle:
                return idle.pop()
            # Made under the lock: `close` would wait for a socket that is made after it.
            connection = self._context.socket(zmq.DEALER)
        address = peer.worker.transports[self.name] if peer.worker else ""
        reply_bytes = blocks_per_reply(self._blocks.shape[1]) * self._blocks.shape[1]
        connection.setsockopt(zmq.LINGER, 0)
        connection.setsockopt(zmq.MAXMSGSIZE, max(reply_bytes, REQUEST_BYTES_MAX))
        try:
            connection.connect(address)
        except zmq.ZMQError as error:
            connection.close()
            raise TransferError("attach", f"{address}: {error}") from None
        return connection

    def _put(self, peer: NodeInfo, connection: "zmq.Socket[bytes]") -> None:
        with self._lock:
            idle = self._idle.setdefault((peer.node_id, peer.epoch), [])
            if not self._closed and len(idle) < IDLE_SOCKETS:
                idle.append(connection)
                return
        connection.close()


class _Read:
    """One READ: its parts, and which of them are asked for and answered."""

    def __init__(
        self,
        blocks: Blocks,
        epoch: int,
        read_id: int,
        source_blocks: Sequence[BlockId],
        local_blocks: Sequence[BlockId],
    ):
        step = blocks_per_reply(blocks.shape[1])
        starts = range(0, len(source_blocks), step)
        self._blocks, self._epoch, self._read_id = blocks, epoch, read_id
        self._sources = [list(source_blocks[start : start + step]) for start in starts]
        self._locals = [list(local_blocks[start : start + step]) for start in starts]

    def run(self, connection: "zmq.Socket[bytes]", deadline_s: float) -> None:
        asked = answered = 0
        while answered < len(self._sources):
            while asked < min(answered + WINDOW, len(self._sources)):
                self._wait(connection, zmq.POLLOUT, deadline_s)
                request = ReadRequest(self._read_id, asked, self._epoch, self._sources[asked])
                connection.send(_encode(request), zmq.DONTWAIT)
                asked += 1
            self._wait(connection, zmq.POLLIN, deadline_s)
            self._absorb(connection.recv_multipart(zmq.DONTWAIT, copy=False), answered)
            answered += 1

    def _wait(self, connection: "zmq.Socket[bytes]", direction: int, deadline_s: float) -> None:
        left_ms = int((deadline_s - time.monotonic()) * 1000)
        if left_ms <= 0 or not connection.poll(left_ms, direction):
            raise TransferError("timeout")

    def _absorb(self, frames: "list[zmq.Frame]", part: int) -> None:
        try:
            reply = _decode_reply(frames[0].buffer)
        except msgspec.DecodeError as error:
            raise TransferError("malformed", str(error)) from None
        if (reply.read_id, reply.part, reply.epoch) != (self._read_id, part, self._epoch):
            raise TransferError("epoch" if reply.epoch != self._epoch else "malformed")
        if reply.error:
            raise TransferError(reply.error)
        block_bytes = self._blocks.shape[1]
        if [len(frame) for frame in frames[1:]] != [block_bytes] * len(self._locals[part]):
            raise TransferError("malformed", "blocks of another size or number")
        for local, frame in zip(self._locals[part], frames[1:], strict=True):
            np.copyto(self._blocks[local], np.frombuffer(frame.buffer, np.uint8))


def bus_address(listen: str, run_dir: str, node_id: str) -> str:
    """Where the KV socket listens: beside the control socket, or on its host at a port of its
    own. StartError: the path would be too long for a socket."""
    if listen.startswith("ipc://"):
        path = f"{run_dir}/{node_id}.kv.sock"
        if len(os.fsencode(path)) > IPC_PATH_BYTES:
            raise StartError(f"slipstream: {path}: too long for a socket; shorten --run-dir", 3)
        return f"ipc://{path}"
    return f"tcp://{_host(listen)}:*"


def _host(address: str) -> str:
    return address.removeprefix("tcp://").rpartition(":")[0]


def _advertised(endpoint: str, advertise: str) -> str:
    if endpoint.startswith("tcp://") and advertise.startswith("tcp://"):
        return f"tcp://{_host(advertise)}:{endpoint.rpartition(':')[2]}"
    return endpoint


def _check_free(path: str) -> None:
    """ZeroMQ takes a path away from a living listener without a word."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            Path(path).unlink(missing_ok=True)
            return
    raise StartError(f"slipstream: KV socket {path}: in use by another process", IN_USE)
