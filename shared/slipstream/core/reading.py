"""Blocks of a peer, under a lease of its, on their way into blocks of ours.

    announced -> READ -> (digests agree) -> Release -> Released(ok) -> usable

Reading first and confirming then is a seqlock: `ok` says that the lease lived all the time, so the
bytes stood still, and no clocks are compared. A READ cannot be called back: if its purpose is given
up, its local blocks stay referenced, in quarantine, until it is over. The executor ends each READ
in time; the machine does not rely on it.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from slipstream.core.blocks import BlockPool
from slipstream.core.machine import Effect, PullBlocks, PullDone, Send
from slipstream.core.prefix import HASH_BYTES
from slipstream.messages import Release, TransferSample
from slipstream.types import BlockId, Epoch, NodeId

DIGEST_BYTES = HASH_BYTES
SAMPLES_MAX = 16
"""Of READs, for one load."""
SOURCES_MAX = 128
"""Of which it is known how much came from each; beyond, the one first read from is forgotten."""
ANSWER_S = 1.0
"""Longest wait for a holder's `Lent`; how much later than it should a READ may end."""


@dataclass(slots=True, eq=False)
class LeasedRead:
    """One lease as its reader sees it."""

    name: str
    """Begins the ids of its READs."""
    source: NodeId
    epoch: Epoch
    local: list[BlockId] = field(default_factory=list)
    """Our blocks, one reference on each; the i-th is for the source's i-th."""
    lease_id: str = ""
    sources: list[BlockId] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    pulled: int = 0
    """Leading blocks that need no READ any more."""
    pulling: str = ""
    """Id of the READ in flight."""
    releasing: bool = False
    failed: str = ""
    pull_end: int = 0
    pulls: int = 0
    due_s: float = math.inf
    """Until when what it waits for has to have happened."""

    def announce(self, sources: list[BlockId], digests: bytes) -> bool:
        """More blocks to read; False if there is not one digest for each."""
        self.sources += sources
        self.digests += [
            digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)
        ]
        return len(self.sources) == len(self.digests)

    def release(self) -> list[Effect]:
        """Ask whether the lease lived; also the way to end it."""
        if not self.lease_id:
            return []
        return [Send(self.source, Release(lease_id=self.lease_id, epoch=self.epoch))]


class Reads:
    """The READs of one worker: those that somebody waits for, and those given up while they ran."""

    def __init__(self, pool: BlockPool, pull_timeout_s: float):
        self.pool, self.pull_timeout_s = pool, pull_timeout_s
        self.given_up: dict[str, LeasedRead] = {}
        self.samples: deque[TransferSample] = deque(maxlen=SAMPLES_MAX)
        self.blocks_from: Counter[NodeId] = Counter()

    def due_s(self, now_s: float) -> float:
        """Of a READ that begins now, and of the word that is asked for after it."""
        return now_s + self.pull_timeout_s + ANSWER_S

    def pull(self, read: LeasedRead, now_s: float) -> Effect:
        """One READ of all that is announced and not read."""
        read.due_s = self.due_s(now_s)
        read.pulls += 1
        read.pulling = f"{read.name}/{read.pulls}"
        read.pull_end = len(read.sources)
        return PullBlocks(
            pull_id=read.pulling,
            peer=read.source,
            epoch=read.epoch,
            source_blocks=tuple(read.sources[read.pulled : read.pull_end]),
            local_blocks=tuple(read.local[read.pulled : read.pull_end]),
            timeout_s=self.pull_timeout_s,
        )

    def land(self, read: LeasedRead, done: PullDone) -> int:
        """The READ is over: how many blocks came as they were announced; else `failed` is set."""
        read.pulling, read.due_s = "", math.inf
        count = read.pull_end - read.pulled
        if done.error is not None:
            read.failed = read.failed or "read"
        elif list(done.digests) != read.digests[read.pulled : read.pull_end]:
            read.failed = read.failed or "digest"
        else:
            read.pulled = read.pull_end
            self.note(read.source, count, done)
            return count
        return 0

    def confirm(self, read: LeasedRead, now_s: float) -> list[Effect]:
        """All is read: did the lease live until now?"""
        read.releasing, read.due_s = True, self.due_s(now_s)
        return read.release()

    def note(self, source: NodeId, num_blocks: int, done: PullDone) -> None:
        """What it took, for the prices; and who gave."""
        if num_blocks:
            sample = TransferSample(source, done.transport, num_blocks, done.elapsed_s)
            self.samples.append(sample)
            self.blocks_from[source] += num_blocks
            if len(self.blocks_from) > SOURCES_MAX:
                del self.blocks_from[next(iter(self.blocks_from))]

    def free(self, read: LeasedRead) -> None:
        """Give the local blocks back, now or as soon as nobody writes into them."""
        if read.pulling:
            self.given_up[read.pulling] = read
            return
        self.pool.release(read.local)
        read.local.clear()

    def stuck(self, due_s: float) -> str:
        """Id of a READ from a peer that was due by then and is not over; "" if there is none. What
        hangs below the pool would hang as well for the worker's next life."""
        reads = self.given_up.values()
        return next((r.pulling for r in reads if r.lease_id and r.due_s <= due_s), "")

    @property
    def hung_loads(self) -> bool:
        """Whether a load from the tiers goes on for which nobody waits any more."""
        return any(not read.lease_id for read in self.given_up.values())

    def over(self, done: PullDone) -> bool:
        """Whether nobody waited for this READ; then its blocks are free."""
        read = self.given_up.pop(done.pull_id, None)
        if read is None:
            return False
        read.pulling = ""
        self.free(read)
        return True
