"""A request as its owner sees it."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from slipstream.core.job import blocks_for
from slipstream.core.prefix import HASH_BYTES
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Drop, Failed, Locate, Located, Resume, Submit
from slipstream.scheduler.decisions import Decision
from slipstream.scheduler.demand import Demand
from slipstream.scheduler.fleet import Fleet
from slipstream.types import BLOCK_TOKENS, NodeId, RequestId, count_tokens


class State(StrEnum):
    RECOVERING = "recovering"
    """Submitted again to a young scheduler: perhaps it runs somewhere."""
    LOCATING = "locating"
    QUEUED = "queued"
    PROBATION = "probation"
    """Suspected of killing workers, it waits until it can run as the only such one."""
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
    lower: dict[NodeId, int] = field(default_factory=dict)
    """How many of them lie in a tier below its pool."""
    decision: Decision | None = None
    """Of the current attempt, or the last one that was placed."""
    since_s: float = 0.0
    """When it was submitted."""
    migrations: int = 0
    losses: int = 0
    """Attempts that a worker failed; from one that left in order it has moved."""
    crashes: int = 0
    """Workers that died with it in a row, without a new token in between."""
    placed_s: float = 0.0
    """When its workers were told of the current attempt."""
    fell_with: NodeId = ""
    """The worker by whose loss, as another worker says, it could not go on."""
    fell_s: float = 0.0
    """When that worker had been told of it."""
    was_begun: bool = False
    """As an earlier submission of it said."""
    orphan_s: float | None = None
    """Since when its tokenizer is silent."""
    owner: int = field(init=False)
    """How many frontends have taken it over."""

    def __post_init__(self) -> None:
        self.owner = self.submit.owner

    @property
    def request_id(self) -> RequestId:
        return self.submit.request_id

    @property
    def model(self) -> str:
        return self.submit.model

    @property
    def adapter(self) -> str:
        return self.submit.adapter

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV an attempt has to have before it makes a new one."""
        return count_tokens(self.submit.prompt) + count_tokens(self.submit.accepted)

    @property
    def longest(self) -> int:
        """Tokens of its prompt and of the longest answer."""
        return count_tokens(self.submit.prompt) + self.submit.sampling.max_tokens

    @property
    def num_blocks(self) -> int:
        return blocks_for(self.num_tokens + 1)

    @property
    def workers(self) -> set[NodeId]:
        """Who may hold something of the current attempt."""
        return {node for node in (self.prefill, self.decode) if node is not None}

    def lost_by(self, cause: str) -> NodeId:
        """The worker whose loss another one gives as the cause of a failed attempt; or empty."""
        return {"prefill_lost": self.prefill, "decode_lost": self.decode}.get(cause) or ""

    def given_s(self, worker: NodeId) -> float:
        """When that worker, which has it or by whose loss it fell, was first told of it: it may
        have been sent there again before that loss was known."""
        if worker != self.fell_with:
            return self.placed_s
        return min(self.fell_s, self.placed_s)

    def replace(self, submit: Submit, tokenizer: NodeId) -> None:
        """The next submission of it is there."""
        self.was_begun = self.begun
        self.submit, self.tokenizer, self.attempt = submit, tokenizer, submit.attempt

    @property
    def call(self) -> str:
        """The call that it is a choice of: its name, less the number of the choice."""
        return self.request_id.rpartition("-")[0] or self.request_id

    @property
    def resumed(self) -> bool:
        """It ran before, as far as is known here."""
        return bool(self.submit.accepted or self.migrations)

    @property
    def rank(self) -> float:
        """In the queue, the least first; of equals each tenant in its turn."""
        return -math.inf if self.resumed else self.submit.priority

    @property
    def cost_tokens(self) -> int:
        """What its turn costs its tenant: the prompt, less what is said to be cached."""
        cached = BLOCK_TOKENS * max(self.hints.values(), default=0)
        return max(BLOCK_TOKENS, self.num_tokens - cached)

    @property
    def begun(self) -> bool:
        """Work was done for it, perhaps by somebody's word from before our time; it is not refused
        any more, however late it is."""
        submit = self.submit
        return bool(self.was_begun or self.migrations or submit.accepted or submit.repeated)

    def overdue(self, now_s: float) -> Problem | None:
        if now_s < self.deadline_s:
            return None
        text = f"The request's time budget is used up; it was {self.state}."
        return Problem(code=ErrorCode.DEADLINE, message=text)

    def demand(self) -> Demand:
        return Demand(self.request_id, self.num_tokens, self.num_blocks, self.hints, self.lower)

    def located(self, found: Located | None, stride: int) -> None:
        """Take the index's word; None: it has none."""
        blocks, lower = (found.blocks, found.lower) if found else ({}, {})
        self.hints = {node: count * stride for node, count in blocks.items()}
        self.lower = {node: count * stride for node, count in lower.items()}

    def resumption(self) -> Resume:
        return Resume(request_id=self.request_id, attempt=self.attempt)


def drop(request_id: RequestId, attempt: int) -> Drop:
    return Drop(request_id=request_id, attempt=attempt)


def failed(request_id: RequestId, problem: Problem) -> Failed:
    return Failed(request_id=request_id, problem=problem)


def given_up(request: Request, limit: int, cause: str) -> Problem:
    return Problem(
        code=ErrorCode.MIGRATIONS,
        message=f"{request.losses} workers failed this request, the limit is {limit} "
        f"(--max-migrations); the last cause: {cause}.",
    )


def question(request: Request, fleet: Fleet, stride: int) -> Locate | None:
    """What the index is asked for it; None without a full block, or a worker to ask about."""
    hashes, workers = request.submit.block_hashes, fleet.workers(request.model)
    if stride > 1:
        starts = range((stride - 1) * HASH_BYTES, len(hashes), stride * HASH_BYTES)
        hashes = b"".join(hashes[start : start + HASH_BYTES] for start in starts)
    if not hashes or not workers or workers[0].worker is None:
        return None
    return Locate(
        request_id=request.request_id,
        attempt=request.attempt,
        kv_layout_id=workers[0].worker.kv_layout_id,
        block_hashes=hashes,
    )
