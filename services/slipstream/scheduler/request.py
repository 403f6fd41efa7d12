"""A request as its owner sees it."""

from dataclasses import dataclass, field
from enum import StrEnum

from slipstream.core.job import blocks_for
from slipstream.errors import Problem
from slipstream.messages import Drop, Failed, Resume, Submit
from slipstream.types import NodeId, RequestId, count_tokens


class State(StrEnum):
    RECOVERING = "recovering"
    """Submitted again to a young scheduler: perhaps it runs somewhere."""
    LOCATING = "locating"
    QUEUED = "queued"
    RESUMING = "resuming"
    """A worker was lost; the tokenizer has to submit the next attempt."""
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHING = "finishing"
    """The last token is made; the tokenizer has not yet said that it has it."""


@dataclass(slots=True, eq=False)
class Request:
    submit: Submit
    tokenizer: NodeId
    deadline_s: float
    attempt: int
    state: State
    prefill: NodeId | None = None
    decode: NodeId | None = None
    hints: dict[NodeId, int] = field(default_factory=dict)
    """Worker -> leading blocks of the prompt that it is said to hold."""
    migrations: int = 0
    orphan_s: float | None = None
    """Since when its tokenizer is silent."""

    @property
    def request_id(self) -> RequestId:
        return self.submit.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV an attempt has to have before it makes a new one."""
        return count_tokens(self.submit.prompt) + count_tokens(self.submit.accepted)

    @property
    def num_blocks(self) -> int:
        return blocks_for(self.num_tokens + 1)

    @property
    def workers(self) -> set[NodeId]:
        """Who may hold something of the current attempt."""
        return {node for node in (self.prefill, self.decode) if node is not None}

    def resumption(self) -> Resume:
        return Resume(request_id=self.request_id, attempt=self.attempt)


def drop(request_id: RequestId, attempt: int) -> Drop:
    return Drop(request_id=request_id, attempt=attempt)


def failed(request_id: RequestId, problem: Problem) -> Failed:
    return Failed(request_id=request_id, problem=problem)
