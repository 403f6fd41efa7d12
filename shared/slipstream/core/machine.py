"""Machines decide, shells do: the protocol between them.

A machine is told what happened (an `Event`) and answers what to do (`Effect`s). It has no clock, no
socket and no randomness of its own. An effect that takes time ends as an event. Only what crosses
a process, device or time boundary is an effect.
"""

import math
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import msgspec

from slipstream.core.kv_events import KvEvent
from slipstream.errors import Problem
from slipstream.messages import (
    AdapterChanged,
    AdapterInfo,
    AnyMessage,
    ChangeAdapter,
    Prompt,
    TextDelta,
    Tokenize,
    TraceFound,
)
from slipstream.spans import Trace, TraceContext
from slipstream.types import (
    BlockHash,
    BlockId,
    Constraint,
    Epoch,
    NodeId,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)


class _Record(msgspec.Struct, frozen=True):
    pass


# --- Events: what happened ------------------------------------------------------------------------


class Started(_Record, frozen=True):
    """The process runs; first event of every machine."""


class Received(_Record, frozen=True):
    source: NodeId
    message: AnyMessage


class PeerUp(_Record, frozen=True):
    """A session with the peer has begun. Nothing said in an earlier one is on its way any more."""

    peer: NodeId
    epoch: Epoch


class PeerDown(_Record, frozen=True):
    """The session is over: the peer is silent, restarted or cut off. What was said last may be
    lost."""

    peer: NodeId


class TimerFired(_Record, frozen=True):
    key: str


class Drain(_Record, frozen=True):
    """SIGTERM: take nothing new, finish what is here."""


class RowOutput(_Record, frozen=True):
    """What one row of a batch plan made: 0..k tokens, in order."""

    request_id: RequestId
    attempt: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of as many prompt tokens as the row asked for."""
    drafted: int = 0
    """Tokens that were proposed; the first len(tokens) - 1 of them were right."""
    problem: Problem | None = None
    """Why there are no tokens; nowhere else there would be."""


class BatchDone(_Record, frozen=True):
    step: int
    outputs: tuple[RowOutput, ...]
    digests: dict[BlockId, bytes]
    """Of the blocks that the plan asked for, after everything in them was written."""
    elapsed_s: float = 0.0


class BatchFailed(_Record, frozen=True):
    """The device refused the step. Nothing of it may be used."""

    step: int
    cause: str


class PullDone(_Record, frozen=True):
    """A READ is over, whatever became of it: from now on nobody writes into its local blocks."""

    pull_id: str
    digests: tuple[bytes, ...] = ()
    """Of the local blocks as read."""
    error: str | None = None
    transport: str = ""
    elapsed_s: float = 0.0


class BlocksDigested(_Record, frozen=True):
    op_id: str
    digests: tuple[bytes, ...] | None
    """None: they could not be made."""


class BlocksSaved(_Record, frozen=True):
    """Nobody copies from these blocks any more. Where they went, `BlocksMoved` says."""

    op_id: str


class BlockMove(_Record, frozen=True):
    """A block is in this tier now and in no better one below the pool; None: in none."""

    block_hash: BlockHash
    position: int
    tier: int | None


class BlocksMoved(_Record, frozen=True):
    moved: tuple[BlockMove, ...]


class AdapterRead(_Record, frozen=True):
    """Rows may want it from now on; or there is none, and why."""

    name: str
    path: str
    adapter: AdapterInfo | None = None
    problem: Problem | None = None


class Encoded(_Record, frozen=True):
    """A prompt was encoded (or not); `request_id` is a request's or a codec call's."""

    request_id: RequestId
    tokens: tuple[int, ...] = ()
    problem: Problem | None = None
    grammar: str = ""
    """What the output must follow, for the workers."""
    bad_tokens: tuple[tuple[int, ...], ...] = ()
    answer_format: str = ""
    """How the answer is told apart; empty: it is content alone."""


class Taken(_Record, frozen=True):
    """What a frontend knows of a stream that was another one's."""

    owner: int = 1
    """The least number that it may have among the stream's frontends."""
    journaled: bool = False
    """There is a journal of it; if not, it goes on only if a tokenizer still has it."""
    accepted: bytes = b""
    prompt_tokens_told: bool = False


class Opened(_Record, frozen=True):
    """An HTTP request was accepted by the frontend's shell."""

    submission: Tokenize
    context: TraceContext | None = None
    model: str = ""
    """As the client called it."""
    taken: Taken | None = None
    """The client comes from another frontend."""


class Closed(_Record, frozen=True):
    """The client went away, or its answer is written."""

    request_id: RequestId


class CodecAsked(_Record, frozen=True):
    call_id: str
    prompt: Prompt | None = None
    tokens: bytes = b""
    model: str = ""


class TraceAsked(_Record, frozen=True):
    """Somebody wants to know the way of the request of this name. Ends as `DeliverTrace`, or not at
    all: whoever asks waits for so long and no longer."""

    call_id: str
    name: str


class AdapterAsked(_Record, frozen=True):
    """An operator wants a LoRA adapter to be there, or without a path to go. Ends as
    `DeliverAdapter`, or not at all."""

    change: ChangeAdapter


class Held(_Record, frozen=True):
    """How many leading blocks of a prompt a worker is said to have, and how many of these lie in
    a tier below its pool."""

    blocks: int
    lower: int = 0


class StoreDone(_Record, frozen=True):
    """An index store operation ended. `gap`: the store does not hold what was said before.
    `holders`: of the workers asked about, those with at least the first block."""

    op_id: str
    ok: bool
    gap: bool = False
    holders: dict[NodeId, Held] = {}


class Counted(_Record, frozen=True):
    """What a worker's or the scheduler's executor has counted so far, now and then: it goes out
    with the load."""

    values: dict[str, float]


Event: TypeAlias = (
    Started
    | Received
    | PeerUp
    | PeerDown
    | TimerFired
    | Drain
    | BatchDone
    | BatchFailed
    | PullDone
    | BlocksDigested
    | BlocksSaved
    | BlocksMoved
    | AdapterRead
    | Encoded
    | Opened
    | Closed
    | CodecAsked
    | TraceAsked
    | AdapterAsked
    | StoreDone
    | Counted
)


# --- Effects: what to do --------------------------------------------------------------------------


class Send(_Record, frozen=True):
    to: NodeId
    message: AnyMessage


class SetTimer(_Record, frozen=True):
    """Fire `key` at `at_s`; replaces an earlier timer of that key."""

    key: str
    at_s: float


class CancelTimer(_Record, frozen=True):
    key: str


class Admission(_Record, frozen=True):
    """First appearance of a request on the device: all that sampling needs to know about it."""

    request_id: RequestId
    attempt: int
    tokens: tuple[int, ...]
    """Prompt, then accepted output."""
    num_prompt: int
    sampling: SamplingParams
    adapter: str = ""
    """The id of the one whose weights are added for it."""


class Row(_Record, frozen=True):
    """One request's share of a step: `tokens` go in at positions `start`…, KV lands in `block_ids`.

    With `sample` a token is drawn after the last input, for output position `position`. With
    `after_previous` the only input is the token drawn last, which the step before this one draws;
    then `start` and `position` are further on by as many tokens as that step has drawn beyond one.

    `drafts`: the device may propose up to so many tokens that could follow and compute them as
    well; it draws a token after each one for as long as they are what was proposed.
    """

    request_id: RequestId
    attempt: int
    tokens: tuple[int, ...]
    start: int
    block_ids: tuple[BlockId, ...]
    """The block table, from the first token of the request on."""
    sample: bool
    position: int = 0
    after_previous: bool = False
    drafts: int = 0
    prompt_logprobs: int = 0
    """After so many inputs, from the first on, a token of the prompt follows whose log probability
    is wanted."""

    @property
    def num_tokens(self) -> int:
        """Of its inputs, drafts left aside."""
        return len(self.tokens) + self.after_previous


class BatchPlan(_Record, frozen=True):
    """One step of the model: prefill chunks and decodes together, as data."""

    step: int
    rows: tuple[Row, ...]
    admitted: tuple[Admission, ...] = ()
    dropped: tuple[tuple[RequestId, int], ...] = ()
    """Requests the device may forget, before it runs the rows."""
    digest_blocks: tuple[BlockId, ...] = ()


class RunBatch(_Record, frozen=True):
    """Ends as `BatchDone` or `BatchFailed`."""

    plan: BatchPlan


class PullBlocks(_Record, frozen=True):
    """Copy `source_blocks` of the peer's pool into `local_blocks`. Always ends as `PullDone`."""

    pull_id: str
    peer: NodeId
    epoch: Epoch
    source_blocks: tuple[BlockId, ...]
    local_blocks: tuple[BlockId, ...]
    timeout_s: float


class DigestBlocks(_Record, frozen=True):
    """Digests of local blocks that nobody writes into; ends as `BlocksDigested`."""

    op_id: str
    blocks: tuple[BlockId, ...]


class SavedBlock(_Record, frozen=True):
    block: BlockId
    block_hash: BlockHash
    position: int
    """How many blocks of its prompt come before it."""
    digest: bytes | None
    """If it is known."""


class SaveBlocks(_Record, frozen=True):
    """Copy these to the tier below, if it takes them; ends as `BlocksSaved`."""

    op_id: str
    blocks: tuple[SavedBlock, ...]


class LoadBlocks(_Record, frozen=True):
    """Bring these from the tiers below into local blocks, verified. Ends as `PullDone` with the
    digests of the leading ones that were there and whole."""

    pull_id: str
    block_hashes: tuple[BlockHash, ...]
    local_blocks: tuple[BlockId, ...]


class LoadAdapter(_Record, frozen=True):
    """Read a LoRA adapter in a thread, while steps run; ends as `AdapterRead`."""

    name: str
    path: str


class DropAdapter(_Record, frozen=True):
    """Give its memory back. No request that is admitted, and none that will be, wants it."""

    adapter_id: str


class PublishKvEvents(_Record, frozen=True):
    """Tell routers that are not ours, in order; nothing comes back."""

    events: tuple[KvEvent, ...]


class EncodePrompt(_Record, frozen=True):
    """Render and encode in a thread, and check what the answer must be; ends as `Encoded`. What is
    still in the thread's queue at `deadline_s` need not be begun."""

    request_id: RequestId
    prompt: Prompt
    constraint: Constraint | None = None
    bad_words: tuple[str, ...] = ()
    parse: bool = False
    deadline_s: float = math.inf


class Deliver(_Record, frozen=True):
    """Frontend machine -> HTTP handler. A `Problem`, or a delta with a finish reason, is the
    end."""

    request_id: RequestId
    item: TextDelta | Problem | int
    """An int is the number of prompt tokens."""


class DeliverCodec(_Record, frozen=True):
    call_id: str
    tokens: bytes = b""
    token_texts: tuple[str, ...] = ()
    text: str = ""
    problem: Problem | None = None


class DeliverTrace(_Record, frozen=True):
    found: TraceFound


class DeliverAdapter(_Record, frozen=True):
    changed: AdapterChanged


class ExportTrace(_Record, frozen=True):
    """Spans for a collector outside. Nothing comes back."""

    trace: Trace


class StoreApply(_Record, frozen=True):
    """Apply one batch of block events if `seq` follows the last; ends as `StoreDone`."""

    op_id: str
    worker: NodeId
    epoch: Epoch
    seq: int
    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    lower: dict[int, tuple[BlockHash, ...]] = {}
    """Tier -> blocks that are there now, and in no better one."""


class StoreReplace(_Record, frozen=True):
    """Replace all that is known of this worker by a snapshot; ends as `StoreDone`."""

    op_id: str
    worker: NodeId
    epoch: Epoch
    seq: int
    stored: tuple[BlockHash, ...] = ()
    lower: dict[int, tuple[BlockHash, ...]] = {}


class StoreFind(_Record, frozen=True):
    """Which of these workers, in these epochs, hold these hashes? Ends as `StoreDone` with
    `holders`. Without workers: is the store there?"""

    op_id: str
    hashes: tuple[BlockHash, ...] = ()
    workers: dict[NodeId, Epoch] = {}


class StoreAlive(_Record, frozen=True):
    """The worker lives: renew what is stored of it, if it is what was applied last. Ends as
    `StoreDone`."""

    op_id: str
    worker: NodeId
    epoch: Epoch
    seq: int


class StoreForget(_Record, frozen=True):
    """A worker's epoch is over: sweep its entries when convenient."""

    worker: NodeId
    epoch: Epoch


class Note(_Record, frozen=True):
    """One line for the log, at info; nothing of a prompt or an answer may be in it."""

    text: str


class Exit(_Record, frozen=True):
    """Drained: the process may end. With `fault` it must, for it can do nothing useful any more."""

    fault: str = ""


Effect: TypeAlias = (
    Send
    | SetTimer
    | CancelTimer
    | RunBatch
    | PullBlocks
    | DigestBlocks
    | SaveBlocks
    | LoadBlocks
    | LoadAdapter
    | DropAdapter
    | PublishKvEvents
    | EncodePrompt
    | Deliver
    | DeliverCodec
    | DeliverTrace
    | DeliverAdapter
    | ExportTrace
    | StoreApply
    | StoreReplace
    | StoreFind
    | StoreAlive
    | StoreForget
    | Note
    | Exit
)


class Machine(Protocol):
    """The only door of a service. Handlers are idempotent: a repeated message changes nothing."""

    def handle(self, event: Event, now_s: float) -> Sequence[Effect]: ...

    def statistics(self) -> dict[str, float]:
        """Immutable gauges and counters, for `/metrics`."""
        ...

    def check(self) -> None:
        """Assert the invariants. Called after every event in simulation and in tests."""
        ...
