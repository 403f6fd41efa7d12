"""Sessions between nodes: every message once, in order, or the news that the session is over.

The bus below may lose, repeat, delay and reorder frames. A session numbers the frames of each
direction, acknowledges, resends, and ends when the peer is silent for `dead_s`, or has begun anew.
Machines above see exactly-once messages and two events: `Up` (a session began; nothing said
before the last `Down` is on its way) and `Down` (it ended; what was said last may be lost). That is
the whole failure model they need, and it is one piece of code instead of a retry per message.

Methods are generators: the caller may `send` between two outputs, and what it says after a `Down`
belongs to the next session.

A session is a pair of numbers, one drawn by each side, larger at each new beginning and larger than
those of any earlier process of that name. A frame names both, the peer's as 0 while unknown. Rules:
  - a session is up once the peer has named our number; what came before that is held back until
    then, for it may be an echo of the past;
  - a frame with a smaller number than the peer's latest is dropped;
  - a larger number means that the peer began anew: `Down` if we were up, and a new number of ours;
  - a peer that speaks of an older number of ours is told the new one, with 0 for its own;
  - a session that ended here is never taken up again (`_floors`);
  - a process that ends in order says so, and who has all of its frames need not wait for silence.
Any traffic is a sign of life; a ping fills silences.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from slipstream.messages import WIRE_VERSION, FrameHeader
from slipstream.types import Epoch, NodeId

ACK_DELAY_S = 0.02
RESEND_FIRST_S = 0.25
RESEND_MAX_S = 1.0
RESEND_FRAMES = 32
UNACKED_FRAMES_MAX = 8192
UNACKED_BYTES_MAX = 64 << 20
EARLY_FRAMES_MAX = 8192


class Transmit(msgspec.Struct, frozen=True):
    """Put one frame on the bus. May be lost."""

    peer: NodeId
    address: str
    header: FrameHeader
    payload: bytes


class Up(msgspec.Struct, frozen=True):
    peer: NodeId
    epoch: Epoch


class Down(msgspec.Struct, frozen=True):
    peer: NodeId


class Arrived(msgspec.Struct, frozen=True):
    peer: NodeId
    payload: bytes


Output: TypeAlias = Transmit | Up | Down | Arrived


@dataclass(slots=True)
class _Session:
    peer: NodeId
    local: int
    heard_s: float
    sent_s: float = 0.0
    remote: int = 0
    """The peer's number; 0 until it has spoken."""
    up: bool = False
    """The peer has named our number beside its own: both mean the same session."""
    next_seq: int = 1
    unacked: deque[tuple[int, bytes]] = field(default_factory=deque)
    unacked_bytes: int = 0
    resend_at_s: float = 0.0
    resend_after_s: float = RESEND_FIRST_S
    expected: int = 1
    early: dict[int, bytes] = field(default_factory=dict)
    ack_at_s: float | None = None
    last: int | None = None
    """The peer has said goodbye: its last frame."""


class Link:
    """All sessions of one node. Pure: time comes in, frames go out as `Transmit`."""

    def __init__(
        self, node_id: NodeId, epoch: Epoch, address: str, dead_s: float = 3.0, ping_s: float = 0.5
    ):
        assert 0 < ping_s < dead_s
        self.node_id, self.epoch, self.address = node_id, epoch, address
        self.dead_s, self.ping_s = dead_s, ping_s
        self.addresses: dict[NodeId, str] = {}
        self.resent_frames = 0
        self._number = epoch
        self._sessions: dict[NodeId, _Session] = {}
        self._epochs: dict[NodeId, Epoch] = {}
        self._floors: dict[NodeId, int] = {}

    @property
    def unread_frames(self) -> int:
        """Sent, and not acknowledged."""
        return sum(len(session.unacked) for session in self._sessions.values())

    def know(self, peer: NodeId, address: str, epoch: Epoch) -> None:
        """Learn where a peer listens, unless a later process of that name is known."""
        if epoch >= self._epochs.get(peer, 0):
            self._epochs[peer] = epoch
            self.addresses[peer] = address

    def send(self, peer: NodeId, payload: bytes, now_s: float) -> Iterator[Output]:
        """Queue one message. A peer that does not read ends its session instead of our memory."""
        if peer not in self.addresses:
            yield Down(peer)
            return
        session = self._sessions.get(peer) or self._open(peer, now_s)
        full = (
            len(session.unacked) >= UNACKED_FRAMES_MAX
            or session.unacked_bytes + len(payload) > UNACKED_BYTES_MAX
        )
        if full:
            yield self._close(session)
            return
        if not session.unacked:
            session.resend_after_s = RESEND_FIRST_S
            session.resend_at_s = now_s + RESEND_FIRST_S
        session.unacked.append((session.next_seq, payload))
        session.unacked_bytes += len(payload)
        session.next_seq += 1
        yield self._transmit(session, session.next_seq - 1, payload, now_s)

    def receive(self, header: FrameHeader, payload: bytes, now_s: float) -> Iterator[Output]:
        """Take one frame from the bus."""
        peer = header.source
        if header.epoch < self._epochs.get(peer, 0):
            return  # an older process of that name: fenced off
        self._epochs[peer] = header.epoch
        self.addresses[peer] = header.address
        session = self._sessions.get(peer) or self._open(peer, now_s)
        if header.session < session.remote:
            return
        if header.session > session.remote:
            if session.up:  # the peer has begun anew: what was in flight is void
                yield self._close(session)
                session = self._sessions.get(peer) or self._open(peer, now_s)
            current = header.peer_session in (0, session.local)
            if header.session <= self._floors.get(peer, 0) or not current:
                yield self._transmit(session, 0, b"", now_s, peer_session=0)
                return
            session.remote, session.expected, session.early = header.session, 1, {}
            session.heard_s = session.ack_at_s = now_s
        if header.peer_session not in (0, session.local):
            return
        session.heard_s = now_s
        if header.peer_session:
            self._acknowledged(session, header.ack, now_s)
            if not session.up:
                session.up = True
                yield Up(peer, header.epoch)
        if header.bye:
            session.last = header.seq
        elif header.seq:
            session.ack_at_s = session.ack_at_s or now_s + ACK_DELAY_S
            if header.seq >= session.expected and len(session.early) < EARLY_FRAMES_MAX:
                session.early[header.seq] = payload
        yield from self._in_order(session)
        whole = session.up and session.last == session.expected - 1
        if whole and self._sessions.get(peer) is session:
            yield self._close(session)

    def leave(self, now_s: float) -> Iterator[Transmit]:
        """The last words of this process, once to every peer. Lost ones are replaced by silence."""
        for session in self._sessions.values():
            if session.remote:
                yield self._transmit(session, session.next_seq - 1, b"", now_s, bye=True)

    def wake(self, now_s: float) -> Iterator[Output]:
        """Do what is due: acknowledge, resend, ping, give up."""
        for session in list(self._sessions.values()):
            if self._sessions.get(session.peer) is not session:
                continue  # closed by what was said in between
            if now_s >= session.heard_s + self.dead_s:  # as in next_wake_s, to the last bit
                down = self._close(session)
                if session.up or session.unacked:
                    yield down
                continue
            if session.unacked and now_s >= session.resend_at_s:
                session.resend_after_s = min(2 * session.resend_after_s, RESEND_MAX_S)
                session.resend_at_s = now_s + session.resend_after_s
                for seq, payload in list(session.unacked)[:RESEND_FRAMES]:
                    self.resent_frames += 1
                    yield self._transmit(session, seq, payload, now_s)
            acknowledge = session.ack_at_s is not None and now_s >= session.ack_at_s
            if acknowledge or (session.remote and now_s >= session.sent_s + self.ping_s):
                yield self._transmit(session, 0, b"", now_s)

    def next_wake_s(self) -> float:
        """When `wake` has something to do; infinity without sessions."""
        due = float("inf")
        for session in self._sessions.values():
            due = min(due, session.heard_s + self.dead_s)
            if session.remote:
                due = min(due, session.sent_s + self.ping_s)
            if session.unacked:
                due = min(due, session.resend_at_s)
            if session.ack_at_s is not None:
                due = min(due, session.ack_at_s)
        return due

    def check(self) -> None:
        for peer, session in self._sessions.items():
            assert peer == session.peer
            assert session.unacked_bytes == sum(len(p) for _, p in session.unacked)
            assert len(session.unacked) <= UNACKED_FRAMES_MAX
            assert not session.remote or session.remote > self._floors.get(peer, 0)

    def _open(self, peer: NodeId, now_s: float) -> _Session:
        self._number += 1
        session = _Session(peer, self._number, heard_s=now_s)
        self._sessions[peer] = session
        return session

    def _close(self, session: _Session) -> Down:
        self._floors[session.peer] = max(self._floors.get(session.peer, 0), session.remote)
        del self._sessions[session.peer]
        return Down(session.peer)

    def _acknowledged(self, session: _Session, ack: int, now_s: float) -> None:
        progress = False
        while session.unacked and session.unacked[0][0] <= ack:
            session.unacked_bytes -= len(session.unacked.popleft()[1])
            progress = True
        if progress:
            session.resend_after_s = RESEND_FIRST_S
            session.resend_at_s = now_s + RESEND_FIRST_S

    def _in_order(self, session: _Session) -> Iterator[Output]:
        """What has arrived without a gap. Until the peer is known to mean this session, it waits:
        it may be the echo of one that is over."""
        while (
            session.up
            and session.expected in session.early
            and self._sessions.get(session.peer) is session
        ):
            payload = session.early.pop(session.expected)
            session.expected += 1
            yield Arrived(session.peer, payload)

    def _transmit(
        self,
        session: _Session,
        seq: int,
        payload: bytes,
        now_s: float,
        peer_session: int | None = None,
        bye: bool = False,
    ) -> Transmit:
        session.sent_s = now_s
        session.ack_at_s = None
        header = FrameHeader(
            version=WIRE_VERSION,
            source=self.node_id,
            epoch=self.epoch,
            address=self.address,
            session=session.local,
            peer_session=session.remote if peer_session is None else peer_session,
            seq=seq,
            ack=session.expected - 1,
            bye=bye,
        )
        return Transmit(session.peer, self.addresses[session.peer], header, payload)
