"""How KV blocks come from a peer's pool into ours: what a READ is, what every transport does."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

from slipstream.kv.device import PoolBlocks
from slipstream.messages import NodeInfo
from slipstream.types import BlockId, NodeId

Digests: TypeAlias = tuple[bytes, ...]
# fmt: off
Cause: TypeAlias = Literal[
    "timeout", "peer", "epoch", "range", "attach", "layout", "transport",
    "closed", "socket", "malformed", "size", "device", "internal",
]
# fmt: on

BLOCKS_MAX = 1 << 24
"""Of a pool: 268 million tokens."""
POOL_BYTES_MAX = 1 << 47
"""What a process can address."""


class TransferError(Exception):
    """A READ that did not happen. `cause` is one word from a closed set, for counting."""

    def __init__(self, cause: Cause, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One READ: `source_blocks` of the peer's pool into rows `local_blocks` of `into`.

    `done` is called exactly once, by any thread, with the digests of what was stored (none unless
    `verify`) or with the reason why the local bytes are worthless. From then on nobody writes into
    the local rows any more, whatever the peer does.
    """

    peer: NodeInfo
    source_blocks: Sequence[BlockId]
    into: PoolBlocks
    local_blocks: Sequence[BlockId]
    deadline_s: float
    """On this host's monotonic clock. A READ ends with cause `timeout` soon after it."""
    done: Callable[[Digests | TransferError], None]
    verify: bool = True


class Transport(Protocol):
    """One way to move blocks. Methods may be called from several threads at a time.

    Blocks move as bytes while their owner may write into them: leases and digests, not the
    transport, tell whether what came is what was meant. Nothing is tried twice in here.
    """

    name: str

    def advertise(self) -> str:
        """How peers reach this worker's pool."""
        ...

    def connect(self, peer: NodeInfo) -> None:
        """Prepare to read from this process; may block for seconds, may be said again.

        TransferError: this way does not lead there.
        """
        ...

    def read(self, read: Read) -> None:
        """Begin a READ from a connected peer. Waits for nobody, but may copy before it returns."""
        ...

    def forget(self, node_id: NodeId) -> None:
        """Let go of what belongs to the peer. Running READs are not disturbed."""
        ...

    def close(self) -> None:
        """End running READs with cause `closed` and serve nobody any more. Idempotent."""
        ...


def read_now(
    transport: Transport,
    peer: NodeInfo,
    source_blocks: Sequence[BlockId],
    into: PoolBlocks,
    local_blocks: Sequence[BlockId],
    timeout_s: float,
    verify: bool = True,
) -> Digests:
    """A READ that blocks the calling thread until it is over. TransferError: it did not happen."""
    over = threading.Event()
    results: list[Digests | TransferError] = []

    def done(result: Digests | TransferError) -> None:
        results.append(result)
        over.set()

    deadline_s = time.monotonic() + timeout_s
    transport.read(Read(peer, source_blocks, into, local_blocks, deadline_s, done, verify))
    over.wait()
    (result,) = results
    if isinstance(result, TransferError):
        raise result
    return result


class PeerPool(NamedTuple):
    """What a peer says of its pool: words that can be true, no more."""

    address: str
    num_blocks: int
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def pool_of(peer: NodeInfo, transport: str, block_bytes: int) -> PeerPool:
    """What there is to read at this peer, by this transport; `block_bytes`: of our blocks.

    TransferError `attach`: nothing. `layout`: its blocks are of another size. `malformed`: no
    process has such a pool.
    """
    worker = peer.worker
    if worker is None or transport not in worker.transports:
        raise TransferError("attach", f"{peer.node_id} has no {transport}")
    pool = PeerPool(worker.transports[transport], worker.num_blocks, worker.block_bytes)
    if pool.block_bytes != block_bytes:
        detail = f"{peer.node_id} has blocks of {pool.block_bytes} bytes, we of {block_bytes}"
        raise TransferError("layout", detail)
    if not 0 <= pool.num_blocks <= BLOCKS_MAX or pool.num_bytes > POOL_BYTES_MAX:
        detail = f"{peer.node_id} says that it has {pool.num_blocks} blocks of {block_bytes} bytes"
        raise TransferError("malformed", detail)
    return pool


def check_read(read: Read, pool: PeerPool) -> None:
    """`pool`: what the peer said when it was connected. TransferError `range`: it, or the pool
    here, has no such block. `layout`: they are of different sizes."""
    count, block_bytes = read.into.shape
    if block_bytes != pool.block_bytes:
        raise TransferError("layout", f"blocks of {pool.block_bytes} bytes into {block_bytes}")
    if not all(0 <= block < pool.num_blocks for block in read.source_blocks):
        raise TransferError("range", f"{read.peer.node_id} has {pool.num_blocks} blocks")
    if not all(0 <= block < count for block in read.local_blocks):
        raise TransferError("range", f"there are {count} blocks here")
    if len(read.source_blocks) != len(read.local_blocks):
        detail = f"{len(read.source_blocks)} blocks into {len(read.local_blocks)}"
        raise TransferError("range", detail)
