"""What rank 0 of a worker and its other ranks say to each other, over a socket pair."""

import socket
import struct
import threading
from typing import Any, TypeAlias

import msgspec

from slipstream.core.machine import BlocksDigested, DigestBlocks, PullBlocks, PullDone
from slipstream.engine.batch import Sizes
from slipstream.messages import NodeInfo
from slipstream.types import Role

_LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 64 << 20


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first word: who you are."""

    settings: dict[str, Any]
    role: Role
    rank: int
    epoch: int
    meeting: str
    """File where the ranks find each other."""


class Room(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded, and so much is left for its pool."""

    num_bytes: int


class MakePool(msgspec.Struct, frozen=True, tag=True):
    num_blocks: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The pool is there, and peers reach it so."""

    transports: dict[str, str]


class Step(msgspec.Struct, frozen=True, tag=True):
    """The next batch, which comes by the ranks' own way, is of these sizes."""

    sizes: Sizes


class Pull(msgspec.Struct, frozen=True, tag=True):
    """Your part of this READ; it ends as `Pulled`."""

    effect: PullBlocks
    peer: NodeInfo | None


class Digest(msgspec.Struct, frozen=True, tag=True):
    """Ends as `Digested`."""

    effect: DigestBlocks


class Peers(msgspec.Struct, frozen=True, tag=True):
    """Who is there now, as your rank reaches them."""

    nodes: tuple[NodeInfo, ...]


class Pulled(msgspec.Struct, frozen=True, tag=True):
    event: PullDone


class Digested(msgspec.Struct, frozen=True, tag=True):
    event: BlocksDigested


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A rank cannot start: the line for the user, and how the worker ends."""

    line: str
    code: int


ToRank: TypeAlias = Begin | MakePool | Step | Pull | Digest | Peers
FromRank: TypeAlias = Room | Ready | Pulled | Digested | Refused


class Wire:
    """Frames of a stream socket. Sends from any thread, receives on one."""

    def __init__(self, connection: socket.socket, heard: Any) -> None:
        """`heard`: the type of what comes."""
        self._connection, self._lock = connection, threading.Lock()
        self._decode = msgspec.msgpack.Decoder(heard).decode

    def send(self, message: ToRank | FromRank) -> None:
        """OSError: the other side is gone."""
        payload = msgspec.msgpack.encode(message)
        with self._lock:
            self._connection.sendall(_LENGTH.pack(len(payload)) + payload)

    def receive(self) -> Any:
        """None: the other side is gone. DecodeError: it is of another version."""
        head = self._read(_LENGTH.size)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > FRAME_BYTES_MAX:
            raise msgspec.DecodeError(f"a frame of {length} bytes")
        payload = self._read(length)
        return None if payload is None else self._decode(payload)

    def _read(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._connection.recv(count - len(parts))
            except OSError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)

    def close(self) -> None:
        self._connection.close()
