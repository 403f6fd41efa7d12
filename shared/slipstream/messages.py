"""Every message on the bus, grouped by receiver. A service decodes only what is meant for it.

Rules: new fields get defaults; nothing is renamed or retyped; whatever acts on a request carries
`(request_id, attempt)`; whatever names a worker's memory carries that worker's `epoch`. Token ids
are packed little-endian int32, block hashes are concatenated 16-byte strings. Durations are
relative.
"""

from enum import StrEnum
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from slipstream.errors import Problem
from slipstream.spans import RequestSpans, Trace
from slipstream.types import (
    BlockId,
    Constraint,
    Epoch,
    FinishReason,
    NodeId,
    RequestId,
    Role,
    SamplingParams,
    TokenLogprobs,
    Usage,
)

WIRE_VERSION = 1

SCHEDULER: NodeId = "scheduler"
"""The one node whose name and address everybody is born with."""

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Tenant = Annotated[str, Meta(max_length=64)]
"""On whose account a request runs: the name of an API key; empty where nobody asks for one."""
Weight = Annotated[int, Meta(ge=1, le=100)]
"""A tenant's part of the queue, to those of the others."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all messages; the class name is the tag."""


# --- Vocabulary inside messages -------------------------------------------------------------------


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A LoRA adapter as it lies in a worker's memory."""

    adapter_id: Annotated[str, Meta(max_length=128)]
    """`name@version`; the version is a digest of what is added: equal ids compute the same."""
    name: str
    path: str
    """Where it was read from."""
    rank: Count = 0
    num_bytes: Count = 0
    generation: Count = 0
    """The scheduler's number of the change that brought it; 0: the worker was started with it."""
    retired: bool = False
    """For requests that began with it alone."""


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a prefill or decode worker offers."""

    model: str
    kv_layout_id: str
    """Model fingerprint, dtype, quantization and block layout. Blocks move only between workers
    where it is equal."""
    num_blocks: Count
    block_bytes: Count
    max_model_len: Count
    vocab_size: Count
    max_num_seqs: Count
    prefill_budget_tokens: Count
    """Prompt tokens a step may compute; 0: does not prefill."""
    accept_decode: bool
    shifted: bool = False
    """`accept_decode` is not what the worker's settings say."""
    transports: dict[str, str] = {}
    """Transport name -> how a peer attaches (a segment, an address)."""
    quantization: str = "none"
    """Of matrix products: what was made of them, or what a checkpoint has, such as `w4a16`."""
    device: str = ""
    """Cores, or a card. Workers of one host that name the same slow each other down."""
    rank_transports: tuple[dict[str, str], ...] = ()
    """As `transports`, of the worker's other ranks: each has its part of every block."""
    adapters: tuple[AdapterInfo, ...] = ()
    """Requests may want these."""


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tokenizer knows of the one model whose tokens it makes."""

    model: str
    sampling: dict[str, float] = {}
    """What the model's makers recommend where a client says nothing."""


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process as it introduces itself."""

    node_id: Name
    role: Role
    epoch: Epoch
    address: str
    """Where its bus inbox listens."""
    wire_version: int = WIRE_VERSION
    host: str = ""
    draining: bool = False
    worker: WorkerInfo | None = None
    tokenizer: TokenizerInfo | None = None

    @property
    def model(self) -> str:
        """Whom it serves; empty: all of them, or nobody says."""
        return (self.worker or self.tokenizer or _ANY).model


_ANY = TokenizerInfo(model="")


class ModelState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of the cluster's models."""

    name: str
    missing: str = ""
    """Why a request for it could not be served now; empty: it could."""
    adapters: list[AdapterInfo] = []
    """Of each name the version that new requests get."""
    fingerprint: str = ""
    """Of the workers that take part; empty: all do."""


class LiveRequest(msgspec.Struct, frozen=True, array_like=True):
    """One line of a worker's report: this attempt lives here."""

    request_id: RequestId
    attempt: int
    waits: bool = False
    """It cannot go on without another worker: half of a hand-over."""


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """What one step did and how long it took: the prices of placement are fitted to these."""

    prefill_tokens: int
    """Over rows of more than one token: the sum of their tokens, u."""
    prefill_pairs: int
    """Over the same rows: the sum of (c + u)^2 - c^2 with c tokens before them."""
    decode_rows: int
    decode_context: int
    """Tokens that the decode rows look back on."""
    elapsed_s: float


class TransferSample(msgspec.Struct, frozen=True, array_like=True):
    """One READ that went well."""

    source: NodeId
    transport: str
    num_blocks: int
    elapsed_s: float


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    """auto, none, required, or with `=` before it the name of the function to be called."""
    parallel_tool_calls: bool = True
    """Whether an answer may have more than one call."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The answer goes on where the last message ends."""
    template_args: dict[str, str | int | float | bool | None] = {}


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    text: str
    add_special_tokens: bool = True


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    tokens: bytes


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


class TextLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's log probability with its text; `top` holds the alternatives, best first."""

    token_id: int
    text: str
    raw: bytes
    logprob: float
    top: tuple["TextLogprob", ...] = ()


class PartKind(StrEnum):
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"
    """A tool call begins; the text is the function's name."""
    ARGUMENTS = "arguments"
    """More of the JSON text of the call that began last."""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A piece of an answer that is told apart: what the model thinks, says and calls."""

    kind: PartKind
    text: str


# --- To everybody ---------------------------------------------------------------------------------


class Peers(Message, kw_only=True, frozen=True):
    """Scheduler -> all, on every change: who lives where. A young scheduler knows few, so a
    node that
    is not listed is not thereby gone; `gone` names those that fell silent, with their last
    epoch."""

    nodes: list[NodeInfo]
    gone: dict[NodeId, Epoch] = {}
    ready: bool = False
    """Whether a request for some model could be served now; if not, `reason` says what is
    missing."""
    reason: str = ""
    models: list[ModelState] = []
    index_stride: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Every n-th block of a prompt is reported to the index and looked up in it."""


# --- To the frontend ------------------------------------------------------------------------------


class Tokenized(Message, kw_only=True, frozen=True):
    """The prompt is encoded and on its way to the scheduler."""

    request_id: RequestId
    prompt_tokens: Count


class TextDelta(Message, kw_only=True, frozen=True):
    """Text of the tokens from `position` on. The text may lag behind the tokens (an unfinished
    character, the beginning of a stop string); a delta with `finish_reason` is the last one."""

    request_id: RequestId
    attempt: int
    position: Count
    """Output tokens before this delta."""
    tokens: bytes = b""
    text: str = ""
    parts: list[Part] = []
    """Of a chat's answer, in place of `text`."""
    logprobs: list[TextLogprob] | None = None
    prompt_logprobs: list[TextLogprob] | None = None
    """With the first output token: one for each prompt token, NaN for the first one."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    path: str = ""
    """Workers that made the tokens, as `prefill-0>decode-1`; on the first and the last delta."""
    decision: str = ""
    """Why these workers, in short; as `path`."""


class TextOut(Message, kw_only=True, frozen=True):
    """Tokenizer -> frontend: one message per step, with the deltas of all its streams."""

    deltas: list[TextDelta]


class Failed(Message, kw_only=True, frozen=True):
    """The request has ended without an answer. Also sent by the scheduler to the tokenizer."""

    request_id: RequestId
    problem: Problem


class CodecResult(Message, kw_only=True, frozen=True):
    call_id: str
    tokens: bytes = b""
    token_texts: list[str] = []
    text: str = ""
    problem: Problem | None = None


class ClusterLoad(Message, kw_only=True, frozen=True):
    """Scheduler -> frontend, once a second: gauges of every worker and of the scheduler itself."""

    gauges: dict[NodeId, dict[str, float]]
    blocks_from: dict[NodeId, dict[NodeId, int]] = {}
    """Reader -> source -> blocks, since the reader's start."""
    requests: dict[str, dict[str, int]] = {}
    """Model -> state -> requests."""


class TraceFound(Message, kw_only=True, frozen=True):
    """Scheduler -> frontend, in answer to `FindTrace`. Lost with the session: the asker gives up
    in time."""

    call_id: str
    traces: list[Trace] = []
    """One for each choice; none: nothing is kept under that name."""
    kept: Count = 0
    """Requests of which there are traces."""


class AdapterChanged(Message, kw_only=True, frozen=True):
    """Scheduler -> frontend, in answer to `ChangeAdapter`. Lost with the session: the asker gives
    up in time."""

    call_id: str
    problem: Problem | None = None


class Sought(Message, kw_only=True, frozen=True):
    """Tokenizer -> frontend, in answer to `Seek`. Lost with the session: the asker gives up in
    time."""

    request_id: RequestId
    attempt: Count = 0
    """The highest that the stream was asked for or runs as; 0: it is not here."""


FrontendInbox: TypeAlias = (
    Peers
    | Tokenized
    | TextOut
    | Failed
    | CodecResult
    | ClusterLoad
    | TraceFound
    | AdapterChanged
    | Sought
)


# --- To the tokenizer -----------------------------------------------------------------------------


class Tokenize(Message, kw_only=True, frozen=True):
    """Frontend -> tokenizer: run this request. Said again after a lost session or to another
    tokenizer; `accepted` are then the output tokens that the frontend already has."""

    request_id: RequestId
    prompt: Prompt
    sampling: SamplingParams
    timeout_s: Seconds
    model: str = ""
    """Whose tokens are wanted; a tokenizer of another one refuses."""
    adapter: str = ""
    """By id, whose weights are added; empty: none."""
    attempt: int = 1
    accepted: bytes = b""
    salt: str = ""
    """Cache namespace of the client; prefixes are shared only within one."""
    clamp_max_tokens: bool = False
    """Shorten `max_tokens` to what the context leaves, where the client named no number."""
    constraint: Constraint | None = None
    bad_words: Annotated[tuple[str, ...], Meta(max_length=128)] = ()
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    """Of requests that wait, those with a lower number run first."""
    tenant: Tenant = ""
    weight: Weight = 1
    parse: bool = False
    """Tell reasoning and tool calls apart from content: deltas have `parts` in place of `text`."""


class Cancel(Message, kw_only=True, frozen=True):
    """Frontend -> tokenizer: the client is gone."""

    request_id: RequestId


class Seek(Message, kw_only=True, frozen=True):
    """Frontend -> tokenizer: is this stream, whose frontend is lost, with you? Who has another
    request under the name says no."""

    request_id: RequestId
    digest: bytes
    """Of the submission, as `core.submission` makes it."""


class Codec(Message, kw_only=True, frozen=True):
    """Encode a prompt or decode tokens, and nothing else (`/tokenize`, `/detokenize`)."""

    call_id: str
    prompt: Prompt | None = None
    tokens: bytes = b""


class TokenSpan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Output tokens of one stream, from `position` on. Repeats are harmless, gaps are waited
    for."""

    request_id: RequestId
    attempt: int
    position: Count
    tokens: bytes
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """At position 0: of each prompt token but the first."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    path: str = ""
    decision: str = ""


class TokensOut(Message, kw_only=True, frozen=True):
    """Worker -> tokenizer: one message per step."""

    spans: list[TokenSpan]


class Resume(Message, kw_only=True, frozen=True):
    """Scheduler -> tokenizer: a worker was lost. Accept only `attempt` from now on, and submit the
    stream again with it and the tokens accepted so far."""

    request_id: RequestId
    attempt: int


TokenizerInbox: TypeAlias = Peers | Tokenize | Cancel | Seek | Codec | TokensOut | Failed | Resume


# --- To the scheduler -----------------------------------------------------------------------------


class Hello(Message, kw_only=True, frozen=True):
    """First word of a session. A worker lists the attempts that live in it; anything else the
    scheduler believes to be there is lost."""

    node: NodeInfo
    live: list[LiveRequest] = []


class Submit(Message, kw_only=True, frozen=True):
    """Tokenizer -> scheduler: a stream that wants to run as `attempt` after its `accepted`
    tokens."""

    request_id: RequestId
    attempt: int
    repeated: bool = False
    """Said before, in an earlier session: this attempt may run already."""
    prompt: bytes
    accepted: bytes = b""
    sampling: SamplingParams
    timeout_s: Seconds
    model: str = ""
    adapter: str = ""
    salt: str = ""
    block_hashes: bytes = b""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    tenant: Tenant = ""
    weight: Weight = 1
    owner: Count = 0
    """How many frontends have taken the stream over so far; an earlier one's submission is
    refused."""


class StreamEnded(Message, kw_only=True, frozen=True):
    """Tokenizer -> scheduler: the stream is over, whatever ended it; also the answer to `Resume` of
    a stream that is not there. Until then the scheduler answers for the request."""

    request_id: RequestId


class WorkerLoad(Message, kw_only=True, frozen=True):
    """Worker -> scheduler, twice a second. `free + used + leased` is the size of the pool."""

    steps: Count
    """Progress: steps finished since the start."""
    running: Count
    waiting: Count
    waiting_tokens: Count
    """Prompt tokens that are queued and not computed."""
    blocks_free: Count
    blocks_used: Count
    blocks_cached: Count
    blocks_leased: Count
    counters: dict[str, float] = {}
    """Since the start: transfers, their bytes and failures by cause, hits, preemptions; and what
    lies in the tiers below the pool."""
    blocks_from: dict[NodeId, Count] = {}
    """Since the start: blocks that came, as they were announced, from each source; under its own
    name those from its tiers."""
    step_samples: list[StepSample] = []
    """Since the last load, some of them if they were many; `transfer_samples` too."""
    transfer_samples: list[TransferSample] = []


class FirstToken(Message, kw_only=True, frozen=True):
    """Worker -> scheduler: this attempt's prompt is computed, and its first token on its way."""

    request_id: RequestId
    attempt: int
    cached_tokens: Count = 0
    fetched_blocks: Count = 0
    """Blocks among them that came from another holder or a lower tier."""


class Started(Message, kw_only=True, frozen=True):
    """Decode -> scheduler: KV verified, the stream runs here; the prefill worker is out of it."""

    request_id: RequestId
    attempt: int


class Finished(Message, kw_only=True, frozen=True):
    """Worker -> scheduler: the stream's last token is made and on its way to the tokenizer."""

    request_id: RequestId
    attempt: int


class AttemptFailed(Message, kw_only=True, frozen=True):
    """Worker -> scheduler: this attempt cannot go on here. With `problem` it can go on nowhere."""

    request_id: RequestId
    attempt: int
    cause: str
    problem: Problem | None = None
    beside: Count = 0
    """How many others were in the step that failed."""


class Located(Message, kw_only=True, frozen=True):
    """kvindex -> scheduler: how many leading blocks each worker is said to hold. A hint."""

    request_id: RequestId
    attempt: int
    blocks: dict[NodeId, int]
    lower: dict[NodeId, int] = {}
    """How many of them are not in the worker's pool but in a tier below it."""


class Spans(Message, kw_only=True, frozen=True):
    """All -> scheduler: what became of requests here. Nobody waits for it, and it may be lost."""

    role: Role
    epoch: Epoch
    requests: list[RequestSpans]


class FindTrace(Message, kw_only=True, frozen=True):
    """Frontend -> scheduler."""

    call_id: str
    name: Name
    """A request's id, an answer's, or the client's `x-request-id`."""


class ChangeAdapter(Message, kw_only=True, frozen=True):
    """Frontend -> scheduler: from now on requests may ask for this adapter, or not any more."""

    call_id: str
    model: str
    name: Name
    path: str = ""
    """Where each worker finds it; empty: the adapter goes."""
    replace: bool = False
    """In the place of the one that has its name."""


class AdapterAnswer(Message, kw_only=True, frozen=True):
    """Worker -> scheduler: what became of a `WantAdapter`. Who has it said `Hello` before."""

    name: Name
    path: str
    generation: Count = 0
    adapter: AdapterInfo | None = None
    problem: Problem | None = None


SchedulerInbox: TypeAlias = (
    Hello
    | Submit
    | StreamEnded
    | WorkerLoad
    | FirstToken
    | Started
    | Finished
    | AttemptFailed
    | Located
    | Spans
    | FindTrace
    | ChangeAdapter
    | AdapterAnswer
)


# --- To a worker ----------------------------------------------------------------------------------


class Prefill(Message, kw_only=True, frozen=True):
    """Compute the KV of prompt and accepted tokens, sample one token, hand over to `decode`."""

    request_id: RequestId
    attempt: int
    prompt: bytes
    accepted: bytes = b""
    sampling: SamplingParams
    tokenizer: NodeId
    decode: NodeId
    timeout_s: Seconds
    adapter: str = ""
    salt: str = ""
    claimed_blocks: Count = 0
    """What the index said is cached here; the worker counts how often that was wrong."""
    holder: NodeId | None = None
    """A worker that is said to have more of the prompt than this one: fetch from it what is missing
    here, up to `holder_blocks` leading blocks."""
    holder_epoch: Epoch = 0
    holder_blocks: Count = 0
    decision: str = ""


class Decode(Message, kw_only=True, frozen=True):
    """Run the stream: with `prefill` after its KV has come from there, else from the prompt on."""

    request_id: RequestId
    attempt: int
    prompt: bytes
    accepted: bytes = b""
    sampling: SamplingParams
    tokenizer: NodeId
    prefill: NodeId | None = None
    prefill_epoch: Epoch = 0
    timeout_s: Seconds
    adapter: str = ""
    salt: str = ""
    claimed_blocks: Count = 0
    holder: NodeId | None = None
    holder_epoch: Epoch = 0
    holder_blocks: Count = 0
    decision: str = ""


class Drop(Message, kw_only=True, frozen=True):
    """Scheduler -> worker: forget every attempt of the request up to this one, free what it
    holds."""

    request_id: RequestId
    attempt: int


class ShiftRole(Message, kw_only=True, frozen=True):
    """Scheduler -> worker: take streams from now on, or no new ones. What runs goes on. The worker
    answers with `Hello`."""

    accept_decode: bool


class WantAdapter(Message, kw_only=True, frozen=True):
    """Scheduler -> worker: have this adapter. Answered by `AdapterAnswer`."""

    name: Name
    path: str
    generation: Count
    retired: bool = False


class UnwantAdapter(Message, kw_only=True, frozen=True):
    """Scheduler -> worker: no new request gets this version."""

    adapter_id: str
    at_once: bool = False
    """Nor is there an old one: its memory can go."""


class KvReady(Message, kw_only=True, frozen=True):
    """Prefill -> decode: these blocks are in memory and stay put while the lease lives."""

    request_id: RequestId
    attempt: int
    lease_id: str
    epoch: Epoch
    first_block: Count
    block_ids: list[BlockId]
    digests: bytes
    """16 bytes a block, over all its bytes."""
    num_tokens: Count
    """Tokens whose KV is valid from the start of the prompt to the end of these blocks."""
    first_token: int | None = None
    """The sampled token; set on the last chunk alone."""
    first_logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] = []
    """Of all but the first token of the prompt, where they were asked for; with `first_token`."""
    cached_tokens: int = 0


class Borrow(Message, kw_only=True, frozen=True):
    """Worker -> holder of a prefix: keep these blocks still under this lease, and say where they
    are."""

    request_id: RequestId
    attempt: int
    lease_id: str
    epoch: Epoch
    """The holder's."""
    first_block: Count
    """The reader has those before."""
    block_hashes: bytes


class Lent(Message, kw_only=True, frozen=True):
    """Holder -> reader: as many leading blocks as there are of those asked for; perhaps none, and
    then there is no lease."""

    request_id: RequestId
    attempt: int
    lease_id: str
    epoch: Epoch
    block_ids: list[BlockId] = []
    digests: bytes = b""


class Renew(Message, kw_only=True, frozen=True):
    """Decode -> prefill: keep these leases for another term."""

    lease_ids: list[str]


class Release(Message, kw_only=True, frozen=True):
    """Decode -> prefill: the READ is over. Was the lease alive all the time?"""

    lease_id: str
    epoch: Epoch


class Released(Message, kw_only=True, frozen=True):
    """Prefill -> decode. Only `ok` makes the blocks that were read usable."""

    lease_id: str
    ok: bool


class StreamAck(Message, kw_only=True, frozen=True):
    """Tokenizer -> worker: the stream's end has arrived; its token log may go."""

    request_id: RequestId
    attempt: int


class Resend(Message, kw_only=True, frozen=True):
    """Tokenizer -> worker: tokens from `position` on, please; earlier ones got lost."""

    request_id: RequestId
    attempt: int
    position: Count


class SnapshotRequest(Message, kw_only=True, frozen=True):
    """kvindex -> worker: your events have a gap; say all that you hold."""

    epoch: Epoch


WorkerInbox: TypeAlias = (
    Peers
    | Prefill
    | Decode
    | Drop
    | ShiftRole
    | WantAdapter
    | UnwantAdapter
    | KvReady
    | Borrow
    | Lent
    | Renew
    | Release
    | Released
    | StreamAck
    | Resend
    | SnapshotRequest
)


# --- To kvindex -----------------------------------------------------------------------------------


class BlockEvents(Message, kw_only=True, frozen=True):
    """Worker -> kvindex: blocks that entered or left its prefix cache, in order of `seq`."""

    epoch: Epoch
    seq: Count
    stored: bytes = b""
    """Blocks that are in the pool now."""
    removed: bytes = b""
    """Blocks that are nowhere any more."""
    lower: dict[int, bytes] = {}
    """Blocks that are no longer in the pool but in this tier (1: host memory, 2: disk)."""


class Snapshot(Message, kw_only=True, frozen=True):
    """Worker -> kvindex: everything in its prefix cache as of `seq`."""

    epoch: Epoch
    seq: Count
    stored: bytes
    lower: dict[int, bytes] = {}


class Locate(Message, kw_only=True, frozen=True):
    """Scheduler -> kvindex: who holds the longest run of these blocks?"""

    request_id: RequestId
    attempt: int
    kv_layout_id: str
    block_hashes: bytes


KvIndexInbox: TypeAlias = Peers | BlockEvents | Snapshot | Locate


AnyMessage: TypeAlias = FrontendInbox | TokenizerInbox | SchedulerInbox | WorkerInbox | KvIndexInbox

INBOXES: dict[Role, Any] = {
    Role.FRONTEND: FrontendInbox,
    Role.TOKENIZER: TokenizerInbox,
    Role.SCHEDULER: SchedulerInbox,
    Role.PREFILL: WorkerInbox,
    Role.DECODE: WorkerInbox,
    Role.KVINDEX: KvIndexInbox,
}


class FrameHeader(msgspec.Struct, frozen=True, array_like=True):
    """First part of every frame; the payload, if any, is the second (see `core.link`)."""

    version: int
    source: NodeId
    epoch: Epoch
    address: str
    session: int
    peer_session: int
    seq: int
    ack: int
    bye: bool = False
    """The process ends in order. Nothing comes with this frame; `seq` is that of its last one."""
