"""Transport `nixl`: UCX, through NIXL: RDMA where there is some, else TCP.

A READ of NIXL cannot be called back: released at its deadline, it still writes when a peer that
hung goes on. So READs land in slabs of our own, and go from there into the pool with the digest's
pass. A READ that is given up ends at once for whoever asked; its slabs are in quarantine until NIXL
says that it is over.
"""

import base64
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec

from slipstream.kernels.verified_copy import verified_copy
from slipstream.kv.huge_pages import HUGE_BYTES, Mapping
from slipstream.kv.nixl_agent import NixlAgent, NixlError
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import Digests, Read, TransferError, check_range
from slipstream.messages import NodeInfo
from slipstream.types import Epoch, NodeId

_LOG = logging.getLogger(__name__)

SLAB_BYTES = 4 << 20
"""Of one slab, unless a single block is larger. Small enough to stay in a cache between the READ
and the copy, large enough to keep a network busy."""
SLABS_MAX = 32
SLABS_PER_PEER = 4
"""In use for one peer, those in quarantine included: a peer that hangs takes no more."""
SLABS_PER_READ = 2
CONNECT_TIMEOUT_S = 5.0
POLL_MIN_S, POLL_MAX_S = 50e-6, 1e-3
QUARANTINE_POLL_S = 0.05


class _Address(msgspec.Struct, frozen=True, array_like=True):
    metadata: bytes
    base: int
    """Address of the pool in its process."""


class _Slab:
    def __init__(self, memory: Blocks, rows: int):
        self.memory, self.rows = memory, rows
        """`rows`: NIXL's list of its blocks."""


class _Peer:
    def __init__(self, node_id: NodeId, epoch: Epoch, agent: str, pool: int):
        self.node_id, self.epoch = node_id, epoch
        self.agent, self.pool = agent, pool
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


class NixlTransport:
    """One agent and one thread, which alone talks to it."""

    name = "nixl"

    def __init__(self, agent: NixlAgent, blocks: Blocks):
        """NixlError: the pool cannot be registered."""
        self._agent = agent
        self._step = max(1, SLAB_BYTES // blocks.shape[1])
        self._block_bytes = blocks.shape[1]
        self._pool = blocks
        agent.serve(blocks)
        address = _Address(agent.metadata(), blocks.ctypes.data)
        self._address = base64.b64encode(msgspec.msgpack.encode(address)).decode()
        self._peers: dict[NodeId, _Peer] = {}
        self._leaving: list[_Peer] = []
        self._slabs: list[_Slab] = []
        self._slabs_made = 0
        self._flights: deque[_Flight] = deque()
        self._chunks: list[_Chunk] = []
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
        self._thread.start()

    def advertise(self) -> str:
        return self._address

    def connect(self, peer: NodeInfo) -> None:
        done: Future[None] = Future()

        def attempt() -> None:
            try:
                self._add(peer)
            except (NixlError, TransferError) as error:
                cause = error if isinstance(error, TransferError) else None
                done.set_exception(cause or TransferError("attach", str(error)))
            else:
                done.set_result(None)

        if not self._say(attempt):
            raise TransferError("closed")
        try:
            done.result(CONNECT_TIMEOUT_S)
        except TimeoutError:
            raise TransferError("timeout", f"{peer.node_id}: NIXL does not answer") from None

    def read(self, read: Read) -> None:
        if not self._say(lambda: self._begin(read)):
            read.done(TransferError("closed"))

    def forget(self, node_id: NodeId) -> None:
        self._say(lambda: self._remove(node_id))

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join()

    def _say(self, command: Callable[[], None]) -> bool:
        with self._lock:
            if not self._closed:
                self._commands.put(command)
            return not self._closed

    def _run(self) -> None:
        quiet_s = 0.0
        while True:
            try:
                command = self._commands.get(timeout=self._patience_s(quiet_s))
            except queue.Empty:
                pass
            else:
                if command is None:
                    self._end_all()
                    return
                command()
                quiet_s = 0.0
            if self._poll(time.monotonic()):
                quiet_s = 0.0  # over `cma` a READ is done when it has been posted
            else:
                quiet_s = min(POLL_MAX_S, max(POLL_MIN_S, quiet_s * 1.2))

    def _patience_s(self, quiet_s: float) -> float | None:
        if self._flights:
            return quiet_s
        return QUARANTINE_POLL_S if self._chunks else None

    def _add(self, info: NodeInfo) -> None:
        known = self._peers.get(info.node_id)
        if known is not None and known.epoch == info.epoch:
            return
        if known is not None:
            self._remove(info.node_id)
        if info.worker is None:
            raise TransferError("attach", f"{info.node_id} is no worker")
        try:
            packed = base64.b64decode(info.worker.transports[self.name], validate=True)
            address = msgspec.msgpack.decode(packed, type=_Address)
        except (ValueError, msgspec.DecodeError) as error:
            raise TransferError("attach", f"{info.node_id}: {error}") from None
        if any((one.node_id, one.epoch) == (info.node_id, info.epoch) for one in self._leaving):
            # Of one name NIXL knows one agent, which is needed until its READs are over.
            raise TransferError("attach", f"{info.node_id}: READs of a lost connection still run")
        agent = self._agent.add(address.metadata)
        count, block_bytes = info.worker.num_blocks, info.worker.block_bytes
        pool = self._agent.prepare(agent, address.base, count, block_bytes)
        self._peers[info.node_id] = _Peer(info.node_id, info.epoch, agent, pool)

    def _remove(self, node_id: NodeId) -> None:
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
        try:
            self._agent.release_list(peer.pool)
            self._agent.remove(peer.agent)
        except NixlError as error:
            _LOG.info("NIXL peer %s: %s", peer.agent, error)

    def _lost(self, peer: _Peer) -> None:
        """The connection broke: the next `connect` makes another."""
        if self._peers.get(peer.node_id) is peer:
            self._remove(peer.node_id)

    def _begin(self, read: Read) -> None:
        peer = self._peers.get(read.peer.node_id)
        try:
            if peer is None or peer.epoch != read.peer.epoch:
                raise TransferError("epoch", f"{read.peer.node_id} is not connected")
            check_range(read)
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
            slab = self._slab(flight.peer) if mine < SLABS_PER_READ else None
            if slab is None:
                break
            sources = flight.read.source_blocks[flight.chunks[flight.posted]]
            try:
                rows = range(len(sources))
                handle = self._agent.post(slab.rows, rows, flight.peer.pool, sources)
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
            if self._slabs_made == SLABS_MAX:
                return None
            memory = self._slab_memory()
            self._agent.register(memory)
            rows = self._agent.prepare("", memory.ctypes.data, *memory.shape)
            self._slabs.append(_Slab(memory, rows))
            self._slabs_made += 1
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
        flight.digests[chunk.index] = verified_copy(
            chunk.slab.memory, rows, read.into, local, read.verify
        )
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

    def _end_all(self) -> None:
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        for flight in list(self._flights):
            self._end(flight, TransferError("closed"))
        self._agent.close()  # before the slabs go: from here on nobody writes into them
