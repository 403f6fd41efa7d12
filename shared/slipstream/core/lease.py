"""Leases: how a worker keeps blocks still while a peer reads them.

granted+ -> started -> renewed* -> released (ok: alive all the time until now) | lapsed | dropped
A lease that ended never lives again, and its id is never used again, so `ok` proves that the bytes
did not change between the grant and the answer, without any agreement on clocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from slipstream.types import BlockId, NodeId, RequestId


@dataclass(slots=True)
class Lease:
    lease_id: str
    request_id: RequestId
    attempt: int
    reader: NodeId
    loan: bool = False
    """Of cached blocks, and not half of a hand-over: its reader can do without."""
    expires_s: float = float("inf")
    blocks: list[BlockId] = field(default_factory=list)


class LeaseTable:
    def __init__(self, term_s: float):
        self.term_s = term_s
        self.live: dict[str, Lease] = {}
        self.granted = self.lapsed = 0

    def grant(self, fresh: Lease, blocks: Sequence[BlockId]) -> None:
        """Begin a lease, or add blocks to it. It does not run until `start`: its owner still
        works."""
        lease_id = fresh.lease_id
        lease = self.live.setdefault(lease_id, fresh)
        self.granted += lease is fresh
        assert lease.expires_s == float("inf"), f"lease {lease_id} grows after its start"
        lease.blocks += blocks

    def start(self, lease_id: str, now_s: float) -> None:
        """Everything is granted: from here on the reader has to renew."""
        self.live[lease_id].expires_s = now_s + self.term_s

    def renew(self, lease_id: str, now_s: float) -> None:
        lease = self.live.get(lease_id)
        if lease is not None and now_s < lease.expires_s < float("inf"):
            lease.expires_s = now_s + self.term_s

    def end(self, lease_id: str) -> Lease | None:
        """End a lease, whatever its state; None if there is none."""
        return self.live.pop(lease_id, None)

    def lapse(self, now_s: float) -> list[Lease]:
        """End what has expired."""
        over = [lease for lease in self.live.values() if lease.expires_s <= now_s]
        for lease in over:
            del self.live[lease.lease_id]
        self.lapsed += len(over)
        return over

    def leased_blocks(self) -> set[BlockId]:
        return {block for lease in self.live.values() for block in lease.blocks}
