"""Streams whose frontend is lost and whose client has come to this one: who still has them."""

from collections.abc import Collection
from dataclasses import dataclass, field

from slipstream.core.machine import Effect, Opened, Send
from slipstream.core.submission import digest
from slipstream.messages import Seek, Sought
from slipstream.types import ATTEMPTS_PER_OWNER, NodeId

SEEK_S = 1.0
"""How long the tokenizers' answers are waited for."""


@dataclass(slots=True, eq=False)
class Seeking:
    """One stream. Every tokenizer is asked: which one has it, only the lost frontend knew, and one
    that had it earlier may have kept it."""

    journaled: bool
    """The client's journal is there: it can go on even if nobody has it."""
    owner: int
    """The least number that this frontend has among those of the stream."""
    until_s: float
    asked: set[NodeId] = field(default_factory=set)
    holder: NodeId = ""
    _attempt: int = 0

    def ask(self, opened: Opened, tokenizers: Collection[NodeId]) -> list[Effect]:
        self.asked = set(tokenizers)
        seek = Seek(request_id=opened.submission.request_id, digest=digest(opened.submission))
        return [Send(tokenizer, seek) for tokenizer in tokenizers]

    def heard(self, source: NodeId, sought: Sought) -> None:
        self.asked.discard(source)
        if sought.attempt > self._attempt:
            self._attempt, self.holder = sought.attempt, source

    def over(self, now_s: float) -> bool:
        return not self.asked or now_s >= self.until_s

    @property
    def found(self) -> bool:
        return self.journaled or bool(self.holder)

    @property
    def attempt(self) -> int:
        """The first one that is this frontend's own."""
        return max(self.owner, self._attempt // ATTEMPTS_PER_OWNER + 1) * ATTEMPTS_PER_OWNER
