"""ZeroMQ below the sessions: one inbox for all peers, one outgoing socket for each.

May lose frames, and does so rather than block: `core.link` sends them again.
"""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq

from slipstream.config import SetupError, StartError
from slipstream.core.link import UNACKED_BYTES_MAX, Transmit
from slipstream.core.node import encode_header
from slipstream.curve import Door, Keys
from slipstream.errors import ExitCode
from slipstream.runtime.names import Names
from slipstream.runtime.ports import holder
from slipstream.types import NodeId, Role

QUEUED_FRAMES_MAX = 10_000
FRAME_BYTES_MAX = UNACKED_BYTES_MAX + 65_536
PEERS_MAX = 512
"""Below the number of sockets that a ZeroMQ context has room for."""
UNUSED_S = 60.0
_BACKLOG = 1024
_RECONNECT_MS = 20
_RECONNECT_MAX_MS = 500

Socket = zmq.Socket[bytes]


@dataclass(slots=True)
class _Peer:
    address: str
    socket: Socket
    used_s: float


class Bus:
    """Never blocks. Counts what it carries and what it cannot."""

    def __init__(self, prog: str, listen: str, keys: Keys | None = None) -> None:
        """Binds `listen`; with `keys` all sockets are CURVE's, and only holders of a key come in.

        StartError, beginning with `prog`, if somebody else is there.
        """
        self.frames_sent = self.frames_received = self.frames_dropped = 0
        self.bytes_sent = self.bytes_received = 0
        self.frames_malformed = 0
        """Of the wrong number of parts; the node counts those that it cannot decode."""
        self._peers: dict[NodeId, _Peer] = {}
        self._names = Names()
        self._path: Path | None = None
        """Of our socket, once it is there."""
        self._context: zmq.Context[Socket] = zmq.Context()
        self._keys, self._door = keys, Door(self._context, keys) if keys else None
        self._inbox = self._context.socket(zmq.ROUTER)
        if keys:
            keys.serve(self._inbox)
        self._inbox.set(zmq.RCVHWM, QUEUED_FRAMES_MAX)
        self._inbox.set(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        self._inbox.set(zmq.BACKLOG, _BACKLOG)
        self._inbox.set(zmq.IPV6, "[" in listen)
        try:
            _bind(self._inbox, prog, listen)
        except StartError:
            self.close(linger_s=0.0)
            raise
        if listen.startswith("ipc://"):
            self._path = Path(listen.removeprefix("ipc://"))

    @property
    def descriptor(self) -> int:
        """Becomes readable once when frames come in: then `receive` until there is nothing."""
        return int(self._inbox.get(zmq.FD))

    def receive(self) -> tuple[bytes, bytes, Role | None] | None:
        """Header and payload of the next frame, and the role of who sent it, if there are keys;
        None if there is no frame."""
        while True:
            sender = None
            try:
                if self._door is None:
                    parts = self._inbox.recv_multipart(zmq.NOBLOCK)
                else:
                    frames = self._inbox.recv_multipart(zmq.NOBLOCK, copy=False)
                    sender = self._door.sender(frames[-1])
                    parts = [frame.bytes for frame in frames]
            except zmq.Again:
                return None
            self.frames_received += 1
            self.bytes_received += sum(map(len, parts[1:]))
            if len(parts) == 3:  # the first one is ZeroMQ's name of the connection
                return parts[1], parts[2], sender
            self.frames_malformed += 1

    def transmit(self, frame: Transmit, now_s: float) -> None:
        """Queues the frame, or drops it if the peer's queue is full or its address is no good."""
        header = encode_header(frame.header)
        address = self._names.numeric(frame.address, now_s)
        if address is None:
            self.frames_dropped += 1
            return
        try:
            peer = self._peer(frame.peer, address, now_s)
            peer.socket.send_multipart((header, frame.payload), zmq.NOBLOCK)
        except zmq.ZMQError:
            self.frames_dropped += 1
            return
        self.frames_sent += 1
        self.bytes_sent += len(header) + len(frame.payload)

    def statistics(self) -> dict[str, float]:
        return {
            "bus_frames_sent_total": self.frames_sent,
            "bus_frames_received_total": self.frames_received,
            "bus_frames_dropped_total": self.frames_dropped,
            "bus_bytes_sent_total": self.bytes_sent,
            "bus_bytes_received_total": self.bytes_received,
        }

    def forget(self, peer: NodeId) -> None:
        """Drops what is queued for the peer, and the connection: the session is over."""
        if found := self._peers.pop(peer, None):
            found.socket.close(linger=0)

    def sweep(self, now_s: float) -> None:
        """Closes connections that nobody has used for a while."""
        for name, peer in list(self._peers.items()):
            if now_s - peer.used_s >= UNUSED_S:
                self.forget(name)

    def close(self, linger_s: float) -> None:
        """Waits up to `linger_s` until what is queued is on its way."""
        if self._path is not None:  # before the close, after which it may be a successor's
            self._path.unlink(missing_ok=True)
        self._inbox.close(linger=0)
        for peer in self._peers.values():
            peer.socket.close(linger=round(linger_s * 1000))
        self._peers.clear()
        if self._door is not None:
            self._door.close()
        self._context.term()

    def _peer(self, name: NodeId, address: str, now_s: float) -> _Peer:
        peer = self._peers.get(name)
        if peer is not None and peer.address == address:
            peer.used_s = now_s
            return peer
        self.forget(name)
        if len(self._peers) >= PEERS_MAX:
            self.forget(min(self._peers, key=lambda other: self._peers[other].used_s))
        outgoing = self._context.socket(zmq.DEALER)
        outgoing.set(zmq.SNDHWM, QUEUED_FRAMES_MAX)
        outgoing.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        outgoing.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        outgoing.set(zmq.IPV6, "[" in address)
        try:
            if self._keys:
                self._keys.approach(outgoing, name)
            outgoing.connect(address)
        except zmq.ZMQError:
            outgoing.close(linger=0)
            raise
        self._peers[name] = _Peer(address, outgoing, now_s)
        return self._peers[name]


def _bind(inbox: Socket, prog: str, listen: str) -> None:
    scheme, _, place = listen.partition("://")
    try:
        if scheme == "ipc":
            with _own_path(prog, listen, Path(place)):
                inbox.bind(listen)
        else:
            inbox.bind(listen)
    except zmq.ZMQError as error:
        port = place.rpartition(":")[2]
        if error.errno == errno.EADDRINUSE and port.isdigit():
            line = f"{prog}: --listen {listen}: in use by {holder(int(port))}"
            raise StartError(line, ExitCode.PORT) from None
        raise SetupError(f"{prog}: --listen {listen}: {error.strerror}") from None
    except OSError as error:
        raise SetupError(f"{prog}: --listen {listen}: {error.strerror}") from None


@contextmanager
def _own_path(prog: str, listen: str, path: Path) -> Iterator[None]:
    """For the time of a bind: nobody listens at the path, nobody else binds in its folder.

    ZeroMQ takes a socket's path from a living listener without a word, so we have to ask.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two that start at once would both find it free
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise SetupError(f"{prog}: --listen {listen}: exists and is not a socket")
        if _listens(path):
            raise StartError(f"{prog}: --listen {listen}: in use by another process", ExitCode.PORT)
        umask = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(umask)
    finally:
        os.close(folder)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True  # its queue is full, or it belongs to another user
    return True
