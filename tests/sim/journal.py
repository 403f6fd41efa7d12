"""The journals of simulated streams, and who may write them: what `frontend.journal` does in its
process, without a clock."""

from dataclasses import dataclass, field

from frontend.journals import Streams
from slipstream.core import machine as m
from slipstream.core.submission import call_digest
from slipstream.frontend.journal import Append, Written
from slipstream.frontend.replay import Replay, packed
from slipstream.messages import TextDelta, Tokenize
from slipstream.types import FinishReason, NodeId


@dataclass
class Writer:
    """One frontend's hold on one call."""

    key: str
    head: bytes
    owner: int
    frontend: NodeId
    number: int = 0
    lost: bool = False
    """What follows is not written any more."""


@dataclass
class Journals:
    store: Streams = field(default_factory=Streams)

    def open(self, submission: Tokenize, frontend: NodeId) -> Writer:
        return Writer(submission.request_id, call_digest([submission]), 0, frontend)

    def write(self, writer: Writer, item: object, fails: bool) -> bool:
        """Ahead of the client; False: the writer is fenced off and must not tell it."""
        if not isinstance(item, int | TextDelta) or writer.lost:
            return True
        if isinstance(item, TextDelta) and item.finish_reason is FinishReason.ERROR:
            return True
        if fails:
            writer.lost = True
            return True
        writer.number += 1
        entry_id = f"{writer.owner}-{writer.number}"
        written = self.store.write(Append(writer.key, entry_id, writer.head, packed([(0, item)])))
        writer.head = b""
        writer.lost = written is not Written.DONE
        return written is not Written.FENCED

    def take(
        self, submission: Tokenize, frontend: NodeId, least: int, fails: bool
    ) -> tuple[Writer, Replay, m.Taken]:
        """What the frontend finds of the stream, and hands to its machine."""
        head = call_digest([submission])
        found = None if fails else self.store.read(submission.request_id, head, least)
        replay = Replay(1)
        replay.read(found.packs if found else ())
        owner = found.owner if found else least
        writer = Writer(submission.request_id, b"" if found else head, owner, frontend, lost=fails)
        return writer, replay, replay.taken(0, owner, journaled=found is not None)
