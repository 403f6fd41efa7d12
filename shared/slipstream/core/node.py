"""A node is a machine with its sessions: what the shell and the simulator both drive.

Frames go in, frames and effects come out; `Send` becomes frames, frames become `Received`. Still
pure, so the simulator runs the very bytes that a real bus would carry.
"""

from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from slipstream.core.link import Arrived, Down, Link, Transmit, Up
from slipstream.core.machine import Effect, Event, Machine, PeerDown, PeerUp, Received, Send
from slipstream.messages import INBOXES, WIRE_VERSION, FrameHeader, NodeInfo, Peers
from slipstream.types import NodeId, Role, role_of

_encode = msgspec.msgpack.Encoder().encode
_encode_header = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(FrameHeader).decode

_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not a message; the last for one nested without end."""

Action: TypeAlias = Transmit | Effect


def encode_header(header: FrameHeader) -> bytes:
    return _encode_header(header)


class Node:
    """One process as the rest of the world sees it."""

    def __init__(
        self,
        info: NodeInfo,
        machine: Machine,
        scheduler: tuple[NodeId, str] | None,
        dead_s: float = 3.0,
    ):
        self.info, self.machine = info, machine
        self.link = Link(info.node_id, info.epoch, info.address, dead_s, ping_s=dead_s / 6)
        if scheduler is not None:
            self.link.know(*scheduler, epoch=0)
        self.frames_malformed = 0
        self._decode = msgspec.msgpack.Decoder(INBOXES[info.role]).decode

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """One event in, everything that follows from it out."""
        return list(self._run(event, now_s))

    def receive(
        self, header: bytes, payload: bytes, sender: Role | None, now_s: float
    ) -> list[Action]:
        """One frame from the bus. `sender`: the role that its connection has proved, if it has.

        A malformed one is counted and dropped, and so is one that bears another role's name.
        """
        try:
            frame = _decode_header(header)
        except _MALFORMED:
            self.frames_malformed += 1
            return []
        if (
            frame.version != WIRE_VERSION
            or frame.source == self.info.node_id
            or (sender is not None and role_of(frame.source) is not sender)
        ):
            self.frames_malformed += 1
            return []
        return list(self._absorb(self.link.receive(frame, payload, now_s), now_s))

    def wake(self, now_s: float) -> list[Action]:
        return list(self._absorb(self.link.wake(now_s), now_s))

    def next_wake_s(self) -> float:
        return self.link.next_wake_s()

    def leave(self, now_s: float) -> list[Transmit]:
        """To be said when the process ends in order."""
        return list(self.link.leave(now_s))

    def check(self) -> None:
        self.link.check()
        self.machine.check()

    def _absorb(
        self, outputs: Iterator[Transmit | Up | Down | Arrived], now_s: float
    ) -> Iterator[Action]:
        """Tell the machine each thing before the link does the next: a word that the machine says
        now must not be taken for one that a session still to be closed has swallowed."""
        for output in outputs:
            match output:
                case Transmit():
                    yield output
                case Up(peer, epoch):
                    yield from self._run(PeerUp(peer, epoch), now_s)
                case Down(peer):
                    yield from self._run(PeerDown(peer), now_s)
                case Arrived(peer, payload):
                    event = self._decoded(peer, payload)
                    if event is not None:
                        yield from self._run(event, now_s)

    def _decoded(self, peer: NodeId, payload: bytes) -> Received | None:
        try:
            message = self._decode(payload)
        except _MALFORMED:
            self.frames_malformed += 1
            return None
        if isinstance(message, Peers):
            for node in message.nodes:
                if node.node_id != self.info.node_id:
                    self.link.know(node.node_id, node.address, node.epoch)
        return Received(peer, message)

    def _run(self, event: Event, now_s: float) -> Iterator[Action]:
        queue = deque([event])
        while queue:
            for effect in self.machine.handle(queue.popleft(), now_s):
                if not isinstance(effect, Send):
                    yield effect
                    continue
                for output in self.link.send(effect.to, _encode(effect.message), now_s):
                    if isinstance(output, Down):
                        queue.append(PeerDown(output.peer))
                    else:
                        assert isinstance(output, Transmit)
                        yield output
