"""The reading half of transport `bus`: one thread for all READs, so that none waits for another.

A READ has a socket of its own while it runs. After a failure the socket is closed: what comes late
for a failed READ comes to nobody.
"""

import itertools
import logging
import os
import queue
import time
from collections import defaultdict, deque

import msgspec
import numpy as np
import zmq

from slipstream.curve import Keys
from slipstream.kv.bus_wire import (
    NAME,
    REQUEST_BYTES_MAX,
    ReadReply,
    ReadRequest,
    blocks_per_reply,
)
from slipstream.kv.cuda_driver import CudaError
from slipstream.kv.device import store
from slipstream.kv.read_thread import Command, Commands
from slipstream.kv.transport import (
    Digests,
    Read,
    TransferError,
    check_read,
    pool_of,
)
from slipstream.messages import NodeInfo
from slipstream.types import Epoch, NodeId

_LOG = logging.getLogger(__name__)

WINDOW = 4
"""Questions under way for one READ."""
READS_PER_PEER = 4
"""Of one peer at a time; more wait in its queue, so that one which hangs holds up itself alone."""

_Socket = zmq.Socket[bytes]
_Peer = tuple[NodeId, Epoch]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ReadReply).decode


class BusReads:
    """One session of the transport's thread. All its sockets are of one context, its own, and end
    with it: also one that nobody remembers."""

    def __init__(self, block_bytes: int, wake: int, keys: Keys | None):
        """`wake`: an eventfd that says that there is a command."""
        self._block_bytes, self._wake, self._keys = block_bytes, wake, keys
        self._context: zmq.Context[_Socket] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(wake, zmq.POLLIN)
        self._running: dict[_Socket, _Flight] = {}
        self._waiting: defaultdict[_Peer, deque[Read]] = defaultdict(deque)
        self._busy: defaultdict[_Peer, int] = defaultdict(int)
        self._idle: defaultdict[_Peer, list[_Socket]] = defaultdict(list)
        self._ids = itertools.count(1)

    def begin(self, read: Read) -> None:
        try:
            check_read(read, pool_of(read.peer, NAME, self._block_bytes))
        except TransferError as error:
            read.done(error)
        else:
            self._waiting[_peer(read)].append(read)
            self._begin(_peer(read))

    def forget(self, node_id: NodeId) -> None:
        for peer in [peer for peer in self._idle if peer[0] == node_id]:
            for connection in self._idle.pop(peer):
                connection.close()

    def wait(self, commands: Commands) -> Command | None:
        for connection, _ in self._poller.poll(self._patience_ms() if commands.empty() else 0):
            if isinstance(connection, int):
                os.eventfd_read(self._wake)
            else:
                self._advance(connection)
        self._expire(time.monotonic())
        try:
            return commands.get_nowait()
        except queue.Empty:
            return None

    def end(self) -> None:
        self._context.destroy(linger=0)

    def _patience_ms(self) -> int | None:
        deadlines = [flight.read.deadline_s for flight in self._running.values()]
        deadlines += [read.deadline_s for line in self._waiting.values() for read in line]
        if not deadlines:
            return None
        return max(0, int((min(deadlines) - time.monotonic()) * 1000) + 1)

    def _begin(self, peer: _Peer) -> None:
        while self._waiting[peer] and self._busy[peer] < READS_PER_PEER:
            read = self._waiting[peer].popleft()
            try:
                idle = self._idle[peer]
                connection = idle.pop() if idle else self._connection(read.peer)
            except TransferError as error:
                read.done(error)
                continue
            self._busy[peer] += 1
            self._running[connection] = _Flight(read, next(self._ids))
            self._poller.register(connection, zmq.POLLIN)
            self._advance(connection)
        for of_peers in (self._waiting, self._busy, self._idle):
            if not of_peers[peer]:
                del of_peers[peer]

    def _advance(self, connection: _Socket) -> None:
        """Ask on, and take one reply if there is one: then it is another READ's turn."""
        flight = self._running[connection]
        try:
            flight.step(connection)
        except TransferError as error:
            self._end(connection, error)
        except zmq.ZMQError as error:
            self._end(connection, TransferError("socket", str(error)))
        except CudaError as error:
            self._end(connection, TransferError("device", str(error)))
        except Exception as error:  # noqa: BLE001 every other READ would end with this thread
            _LOG.exception("READ from %s", flight.read.peer.node_id)
            self._end(connection, TransferError("internal", str(error)))
        else:
            if flight.complete:
                self._end(connection, tuple(flight.digests))

    def _end(self, connection: _Socket, result: Digests | TransferError) -> None:
        flight = self._running.pop(connection)
        peer = _peer(flight.read)
        self._poller.unregister(connection)
        self._busy[peer] -= 1
        if isinstance(result, TransferError) or len(self._idle[peer]) >= READS_PER_PEER:
            connection.close()
        else:
            self._idle[peer].append(connection)
        flight.read.done(result)
        self._begin(peer)

    def _expire(self, now_s: float) -> None:
        late = [c for c, flight in self._running.items() if flight.read.deadline_s <= now_s]
        for connection in late:
            self._end(connection, TransferError("timeout"))
        for peer, line in list(self._waiting.items()):
            for read in [read for read in line if read.deadline_s <= now_s]:
                line.remove(read)
                read.done(TransferError("timeout", f"{READS_PER_PEER} READs before it"))
            if not line:
                del self._waiting[peer]

    def _connection(self, peer: NodeInfo) -> _Socket:
        return connection_to(peer, self._block_bytes, self._context, self._keys)


class _Flight:
    """One READ: its parts, and which of them are asked for and answered."""

    def __init__(self, read: Read, read_id: int):
        step = blocks_per_reply(read.into.shape[1])
        starts = range(0, len(read.source_blocks), step)
        self.read, self._read_id = read, read_id
        self._sources = [list(read.source_blocks[start : start + step]) for start in starts]
        self._locals = [list(read.local_blocks[start : start + step]) for start in starts]
        self._asked = self._answered = 0
        self.digests: list[bytes] = []

    @property
    def complete(self) -> bool:
        return self._answered == len(self._sources)

    def step(self, connection: _Socket) -> None:
        if self._asked > self._answered:
            try:
                frames = connection.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            self._absorb(frames)
        while self._asked < min(self._answered + WINDOW, len(self._sources)):
            sources, epoch = self._sources[self._asked], self.read.peer.epoch
            request = ReadRequest(self._read_id, self._asked, epoch, sources)
            connection.send(_encode(request), zmq.DONTWAIT)
            self._asked += 1

    def _absorb(self, frames: list[zmq.Frame]) -> None:
        read, part = self.read, self._answered
        try:
            reply = _decode(frames[0].buffer)
        except (ValueError, RecursionError) as error:  # DecodeError is one
            raise TransferError("malformed", str(error)) from None
        if reply.epoch != read.peer.epoch:
            raise TransferError("epoch")
        if (reply.read_id, reply.part) != (self._read_id, part):
            raise TransferError("malformed", "the answer to something else")
        if reply.error:
            raise TransferError(reply.error)
        block_bytes = read.into.shape[1]
        if [len(frame) for frame in frames[1:]] != [block_bytes] * len(self._locals[part]):
            raise TransferError("malformed", "blocks of another size or number")
        for local, frame in zip(self._locals[part], frames[1:], strict=True):
            row = np.frombuffer(frame.buffer, np.uint8).reshape(1, block_bytes)
            self.digests += store(row, (0,), read.into, (local,), read.verify)
        self._answered += 1


def _peer(read: Read) -> _Peer:
    return read.peer.node_id, read.peer.epoch


def connection_to(
    peer: NodeInfo, block_bytes: int, context: "zmq.Context[_Socket]", keys: Keys | None
) -> _Socket:
    """A socket that asks for a peer's blocks. That somebody is there is for the answer to show.

    TransferError: see `pool_of`; `attach`: this is no address. `socket`: there can be no more.
    """
    pool = pool_of(peer, NAME, block_bytes)
    reply_bytes = blocks_per_reply(pool.block_bytes) * pool.block_bytes
    try:
        connection = context.socket(zmq.DEALER)
    except zmq.ZMQError as error:
        raise TransferError("socket", str(error)) from None
    try:
        connection.setsockopt(zmq.LINGER, 0)
        connection.setsockopt(zmq.MAXMSGSIZE, max(reply_bytes, REQUEST_BYTES_MAX))
        if keys is not None:
            keys.approach(connection, peer.node_id)
        connection.connect(pool.address)
    except (zmq.ZMQError, TypeError, UnicodeError) as error:
        connection.close()
        raise TransferError("attach", f"{pool.address!r}: {error}") from None
    return connection
