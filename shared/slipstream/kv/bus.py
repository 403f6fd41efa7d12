"""Transport `bus`: blocks over ZeroMQ sockets of their own. Works everywhere, needs nothing."""

import logging
import os
import socket
import threading
from pathlib import Path
from typing import Literal

import msgspec
import zmq

from slipstream.config import SetupError, StartError
from slipstream.config.service import IPC_PATH_BYTES
from slipstream.curve import Door, Keys
from slipstream.errors import ExitCode
from slipstream.kv.bus_reader import BusReads, connection_to
from slipstream.kv.bus_wire import (
    NAME,
    REQUEST_BYTES_MAX,
    ReadReply,
    ReadRequest,
    Refusal,
    blocks_per_reply,
)
from slipstream.kv.device import PoolBlocks, load
from slipstream.kv.read_thread import ReadThread
from slipstream.kv.transport import Read, TransferError
from slipstream.messages import NodeInfo
from slipstream.types import NodeId

_LOG = logging.getLogger(__name__)

QUEUE_REPLIES = 64


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(ReadRequest).decode


class BusServer:
    """Answers READs of this worker's pool from a thread of its own."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        bind: str,
        blocks: PoolBlocks,
        epoch: int,
        keys: Keys | None,
    ):
        self.malformed = 0
        self._blocks, self._epoch = blocks, epoch
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES_MAX)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_REPLIES)
        if keys is not None:
            keys.serve(self._socket)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._socket.close()
            raise StartError(f"slipstream: KV socket {bind}: {error}", ExitCode.PORT) from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.path = Path(bind.removeprefix("ipc://")) if bind.startswith("ipc://") else None
        if self.path is not None:
            self.path.chmod(0o600)
        self._thread = threading.Thread(target=self._serve, name="kv-bus-server", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Ends with the context."""
        try:
            while True:
                self._obey(self._socket.recv_multipart())
        except zmq.ContextTerminated:
            pass
        finally:
            self._socket.close()

    def _obey(self, frames: list[bytes]) -> None:
        try:
            reply = self._answer(frames)
            if reply is not None:
                # A reader that does not take its answers loses them, and nobody waits for it.
                self._send([frames[0], *reply])
        except zmq.ContextTerminated:
            raise
        except Exception:  # noqa: BLE001 one question would be the last one for everybody
            _LOG.exception("a READ of our blocks")

    def _send(self, frames: list[bytes | memoryview]) -> None:
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            _LOG.warning("a reader of KV blocks does not take its answers")

    def _answer(self, frames: list[bytes]) -> list[bytes | memoryview] | None:
        try:
            _, payload = frames
            request = _decode_request(payload)
        except (ValueError, RecursionError):  # DecodeError is one
            self.malformed += 1
            return None
        error = self._refusal(request)
        head = _encode(ReadReply(request.read_id, request.part, self._epoch, error))
        if error:
            return [head]
        return [head, *(block.data for block in load(self._blocks, request.blocks))]

    def _refusal(self, request: ReadRequest) -> Refusal | Literal[""]:
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

    name = NAME

    def __init__(
        self,
        blocks: PoolBlocks,
        epoch: int,
        bind: str,
        advertise: str = "",
        keys: Keys | None = None,
    ):
        """`bind`: where to listen; a tcp port of `*` is chosen by the system. `advertise`: host
        that peers use where it is not the one of `bind`. `keys`: as for the bus of messages.
        StartError: the address is taken."""
        if bind.startswith("ipc://"):
            _check_free(bind.removeprefix("ipc://"))
        block_bytes = self._block_bytes = int(blocks.shape[1])
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keys, self._door = keys, Door(self._context, keys) if keys else None
        try:
            self._server = BusServer(self._context, bind, blocks, epoch, keys)
        except StartError:
            self._close_door()
            raise
        self._lock, self._closed = threading.Lock(), False
        self._wake = wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reader = ReadThread(
            NAME, lambda: BusReads(block_bytes, wake, keys), lambda: os.eventfd_write(wake, 1)
        )
        self._address = _advertised(self._server.endpoint, advertise)

    @property
    def malformed(self) -> int:
        """Requests that could not be read."""
        return self._server.malformed

    def advertise(self) -> str:
        return self._address

    def connect(self, peer: NodeInfo) -> None:
        """Whether the address can be one. That somebody answers is for the first READ to show."""
        with self._lock:
            if self._closed:
                raise TransferError("closed")
            connection_to(peer, self._block_bytes, self._context, self._keys).close()

    def read(self, read: Read) -> None:
        self._reader.read(read)

    def forget(self, node_id: NodeId) -> None:
        self._reader.ask(lambda reads: reads.forget(node_id))

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
        self._reader.close()
        self._close_door()
        self._context.term()  # wakes the server, and waits until it is gone
        if not closed:
            os.close(self._wake)
        if self._server.path is not None:
            self._server.path.unlink(missing_ok=True)  # ZeroMQ leaves it behind

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()


def bus_address(listen: str, run_dir: str, node_id: str) -> str:
    """Where the KV socket listens: beside the control socket, or on its host at a port of its
    own. StartError: the path would be too long for a socket."""
    if listen.startswith("ipc://"):
        path = f"{run_dir}/{node_id}.kv.sock"
        if len(os.fsencode(path)) > IPC_PATH_BYTES:
            raise SetupError(f"slipstream: {path}: too long for a socket; shorten --run-dir")
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
    raise StartError(f"slipstream: KV socket {path}: in use by another process", ExitCode.PORT)
