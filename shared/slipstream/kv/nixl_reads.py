"""The reading half of transport `nixl`: peers, slabs, and the READs on their way through them.

A READ of NIXL cannot be called back: released at its deadline, it still writes when a peer that
hung goes on. So READs land in slabs of our own, and go from there into the pool with the digest's
pass. A READ that is given up ends at once for whoever asked; its slabs are in quarantine until NIXL
says that it is over.
"""

import base64
import logging
import queue
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from slipstream.kv.cuda_driver import CudaError
from slipstream.kv.device import store
from slipstream.kv.huge_pages import HUGE_BYTES, Mapping
from slipstream.kv.nixl_agent import NixlError, NixlReader
from slipstream.kv.read_thread import Command, Commands
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import Digests, PeerPool, Read, TransferError, check_read, pool_of
from slipstream.messages import NodeInfo
from slipstream.types import Epoch, NodeId

_LOG = logging.getLogger(__name__)

NAME = "nixl"
SLAB_BYTES = 4 << 20
"""Of one slab, unless a single block is larger. Small enough to stay in a cache between the READ
and the copy, large enough to keep a network busy."""
SLABS_MAX = 32
SLABS_PER_PEER = 4
"""In use for one peer, those in quarantine included: a peer that hangs takes no more."""
SLABS_PER_READ = 2
POLL_MIN_S, POLL_MAX_S = 50e-6, 1e-3
QUARANTINE_POLL_S = 0.05
ADDRESSES = 1 << 64


class Address(msgspec.Struct, frozen=True, array_like=True):
    """How peers reach a pool."""

    metadata: bytes
    base: int
    """Where the pool begins, in its process."""
    gpu: int | None = None
    """In the memory of which of its GPUs; none: in the host's."""


class _Slab:
    def __init__(self, memory: Blocks, rows: int):
        self.memory, self.rows = memory, rows
        """`rows`: NIXL's list of its blocks."""


class _Peer:
    def __init__(self, node_id: NodeId, epoch: Epoch, told: PeerPool, agent: str, rows: int):
        self.node_id, self.epoch, self.told = node_id, epoch, told
        self.agent, self.rows = agent, rows
        """`rows`: NIXL's list of its blocks."""
        self.slabs = 0


class _Flight:
    """One READ, cut into chunks of a slab."""

    def __init__(self, read: Read, peer: _Peer, step: int):
        starts = range(0, len(read.source_blocks), step)
        self.read, self.peer = read, peer
        self.chunks = [slice(start, start + step) for start in starts]
        self.posted = 0
        self.digests: list[Digests | None] = [None] * len(self.chunks)
        self.over = False


class _Chunk:
    def __init__(self, flight: _Flight, index: int, slab: _Slab, handle: int):
        self.flight, self.index, self.slab, self.handle = flight, index, slab, handle


class NixlReads:
    """One session of the transport's thread: with another one everything begins anew."""

    def __init__(self, agent: NixlReader, block_bytes: int):
        self._agent = agent
        self._step = max(1, SLAB_BYTES // block_bytes)
        self._block_bytes = block_bytes
        self._peers: dict[NodeId, _Peer] = {}
        self._leaving: list[_Peer] = []
        self._slabs: list[_Slab] = []
        self._slabs_made: list[_Slab] = []
        """All of them: NIXL may write into each until the agent is closed."""
        self._flights: deque[_Flight] = deque()
        self._chunks: list[_Chunk] = []
        self._quiet_s = 0.0

    def wait(self, commands: Commands) -> Command | None:
        if self._poll(time.monotonic()):
            self._quiet_s = 0.0  # over `cma` a READ is done when it has been posted
        else:
            self._quiet_s = min(POLL_MAX_S, max(POLL_MIN_S, self._quiet_s * 1.2))
        try:
            command = commands.get(timeout=self._patience_s())
        except queue.Empty:
            return None
        self._quiet_s = 0.0
        return command

    def _patience_s(self) -> float | None:
        if self._flights:
            return self._quiet_s
        return QUARANTINE_POLL_S if self._chunks else None

    def add(self, info: NodeInfo) -> None:
        """TransferError: there is no way to it, or it cannot be what it says."""
        known = self._peers.get(info.node_id)
        if known is not None and known.epoch == info.epoch:
            return
        self.remove(info.node_id)
        told = pool_of(info, NAME, self._block_bytes)
        try:
            packed = base64.b64decode(told.address, validate=True)
            address = msgspec.msgpack.decode(packed, type=Address)
        except ValueError as error:  # DecodeError is one
            raise TransferError("attach", f"{info.node_id}: {error}") from None
        if not 0 <= address.base <= ADDRESSES - told.num_bytes:
            detail = f"{info.node_id} has {told.num_bytes} bytes at address {address.base}"
            raise TransferError("malformed", detail)
        if any((one.node_id, one.epoch) == (info.node_id, info.epoch) for one in self._leaving):
            # Of one name NIXL knows one agent, which is needed until its READs are over.
            raise TransferError("attach", f"{info.node_id}: READs of a lost connection still run")
        agent = None
        try:
            agent = self._agent.add(address.metadata)
            rows = self._agent.prepare(
                agent, address.base, told.num_blocks, told.block_bytes, address.gpu
            )
        except NixlError as error:
            if agent is not None:
                self._disown(agent)
            raise TransferError("attach", f"{info.node_id}: {error}") from None
        self._peers[info.node_id] = _Peer(info.node_id, info.epoch, told, agent, rows)

    def remove(self, node_id: NodeId) -> None:
        peer = self._peers.pop(node_id, None)
        if peer is not None:
            self._leaving.append(peer)
            self._let_go(peer)

    def _let_go(self, peer: _Peer) -> None:
        """Not under a READ: NIXL would no longer say whether it is over."""
        reading = peer.slabs or any(flight.peer is peer for flight in self._flights)
        if reading or peer not in self._leaving:
            return
        self._leaving.remove(peer)
        self._disown(peer.agent, peer.rows)

    def _disown(self, agent: str, *lists: int) -> None:
        try:
            for rows in lists:
                self._agent.release_list(rows)
            self._agent.remove(agent)
        except NixlError as error:
            _LOG.info("NIXL peer %s: %s", agent, error)

    def _lost(self, peer: _Peer) -> None:
        """The connection broke: the next `connect` makes another."""
        if self._peers.get(peer.node_id) is peer:
            self.remove(peer.node_id)

    def begin(self, read: Read) -> None:
        peer = self._peers.get(read.peer.node_id)
        try:
            if peer is None:
                raise TransferError("peer", f"{read.peer.node_id} is not connected")
            if peer.epoch != read.peer.epoch:
                raise TransferError("epoch", f"{read.peer.node_id} is another")
            check_read(read, peer.told)
        except TransferError as error:
            read.done(error)
            return
        self._flights.append(_Flight(read, peer, self._step))

    def _poll(self, now_s: float) -> bool:
        """One look at everything; whether something has moved."""
        moved = False
        for chunk in list(self._chunks):
            try:
                if self._agent.running(chunk.handle):
                    continue
                error = None
            except NixlError as failure:
                error = TransferError("peer", str(failure))
            moved = True
            self._chunks.remove(chunk)
            self._agent.release(chunk.handle)
            chunk.flight.peer.slabs -= 1
            if error is None and not chunk.flight.over:
                self._post_all(chunk.flight)  # the next READ, before this one is copied
            if not chunk.flight.over:  # which it also is when that could not be posted
                self._landed(chunk, error)
            self._slabs.append(chunk.slab)
            self._let_go(chunk.flight.peer)
        for flight in list(self._flights):
            if flight.read.deadline_s <= now_s:
                self._end(flight, TransferError("timeout"))
            else:
                moved = self._post_all(flight) or moved
        return moved

    def _post_all(self, flight: _Flight) -> bool:
        """As many chunks as may be under way. A READ of nothing ends here."""
        posted = False
        while not flight.over and flight.posted < len(flight.chunks):
            mine = sum(chunk.flight is flight for chunk in self._chunks)
            try:
                slab = self._slab(flight.peer) if mine < SLABS_PER_READ else None
            except (NixlError, OSError) as error:
                self._end(flight, TransferError("internal", f"no memory for READs: {error}"))
                return True
            if slab is None:
                break
            sources = flight.read.source_blocks[flight.chunks[flight.posted]]
            try:
                rows = range(len(sources))
                handle = self._agent.post(slab.rows, rows, flight.peer.rows, sources)
            except NixlError as error:
                self._slabs.append(slab)
                flight.peer.slabs -= 1
                self._end(flight, TransferError("peer", str(error)))
                self._lost(flight.peer)
                return True
            self._chunks.append(_Chunk(flight, flight.posted, slab, handle))
            flight.posted += 1
            posted = True
        self._finish(flight)
        return posted

    def _slab(self, peer: _Peer) -> _Slab | None:
        if peer.slabs >= SLABS_PER_PEER:
            return None
        if not self._slabs:
            if len(self._slabs_made) == SLABS_MAX:
                return None
            memory = self._slab_memory()
            self._agent.register(memory)
            rows = self._agent.prepare("", memory.ctypes.data, *memory.shape)
            slab = _Slab(memory, rows)
            self._slabs_made.append(slab)
            self._slabs.append(slab)
        peer.slabs += 1
        return self._slabs.pop()

    def _slab_memory(self) -> Blocks:
        """uint8 `[step, block_bytes]`, in huge pages where the kernel has them."""
        size = self._step * self._block_bytes
        flat = Mapping(-(-size // HUGE_BYTES) * HUGE_BYTES).bytes
        flat[:] = 0
        return flat[:size].reshape(self._step, self._block_bytes)

    def _landed(self, chunk: _Chunk, error: TransferError | None) -> None:
        flight, read = chunk.flight, chunk.flight.read
        if error is not None:
            self._end(flight, error)
            self._lost(flight.peer)
            return
        local: Sequence[int] = read.local_blocks[flight.chunks[chunk.index]]
        rows = range(len(local))
        try:
            made = store(chunk.slab.memory, rows, read.into, local, read.verify)
        except CudaError as failure:
            self._end(flight, TransferError("device", str(failure)))
            return
        flight.digests[chunk.index] = made
        self._finish(flight)

    def _finish(self, flight: _Flight) -> None:
        if flight.over or None in flight.digests:
            return
        self._end(flight, tuple(x for chunk in flight.digests for x in chunk or ()))

    def _end(self, flight: _Flight, result: Digests | TransferError) -> None:
        if flight.over:
            return
        flight.over = True
        self._flights.remove(flight)
        flight.read.done(result)
        self._let_go(flight.peer)

    def end(self) -> None:
        self._agent.close()  # before the slabs go: from here on nobody writes into them
