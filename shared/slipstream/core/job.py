"""One attempt of one request as it lives in a worker."""

from dataclasses import dataclass, field

from slipstream.core.machine import Row
from slipstream.core.prefix import extend_hashes
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Decode, FirstToken, Prefill, TokenSpan, WorkerInfo
from slipstream.types import (
    BLOCK_TOKENS,
    BlockHash,
    BlockId,
    FinishReason,
    NodeId,
    RequestId,
    SamplingParams,
    TokenLogprobs,
    pack_tokens,
    unpack_tokens,
)


@dataclass(slots=True, eq=False)
class Job:
    """Tokens are [prompt | accepted before this attempt | made in this attempt].

    KV of `tokens[:num_computed]` lies in `block_ids`; the last token's KV is never computed before
    it serves as input. `handover` names the decode worker if this worker only prefills.
    """

    request_id: RequestId
    attempt: int
    sampling: SamplingParams
    tokenizer: NodeId
    space: bytes
    tokens: list[int]
    num_prompt: int
    num_accepted: int
    deadline_s: float
    handover: NodeId | None = None
    path: str = ""
    adapter: str = ""
    block_ids: list[BlockId] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    num_computed: int = 0
    cached_tokens: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    sent: int = 0
    """Output tokens of this attempt that went to the tokenizer."""
    announced_blocks: int = 0
    digested_blocks: int = 0
    """Leading blocks whose digests are known, or asked for with a step."""
    flying: list[Row] = field(default_factory=list)
    """Its shares of the steps in flight, in order."""
    on_device: bool = False
    preemptions: int = 0
    fetched_blocks: int = 0
    """Blocks that came from another holder before the prompt was computed."""
    decision: str = ""
    dropped: bool = False
    finish_reason: FinishReason | None = None
    stop_token: int | None = None

    @classmethod
    def of(cls, message: Prefill | Decode, space: bytes, node_id: NodeId, now_s: float) -> "Job":
        prompt, accepted = unpack_tokens(message.prompt), unpack_tokens(message.accepted)
        if isinstance(message, Prefill):
            pair = (node_id, message.decode)
        else:
            pair = (message.prefill or node_id, node_id)
        return cls(
            request_id=message.request_id,
            attempt=message.attempt,
            sampling=message.sampling,
            tokenizer=message.tokenizer,
            space=space,
            tokens=prompt + accepted,
            num_prompt=len(prompt),
            num_accepted=len(accepted),
            deadline_s=now_s + message.timeout_s,
            handover=message.decode if isinstance(message, Prefill) else None,
            path=">".join(dict.fromkeys(pair)),
            adapter=message.adapter,
            decision=message.decision,
        )

    @property
    def key(self) -> tuple[RequestId, int]:
        return self.request_id, self.attempt

    @property
    def num_output(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.num_prompt

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt are still to be computed: all of them, for they
        lie in no cache."""
        return self.sampling.prompt_logprobs is not None and not self.num_output

    @property
    def ahead(self) -> int:
        """Tokens whose KV the steps in flight make, if each draws one token."""
        return sum(row.num_tokens for row in self.flying)

    @property
    def drawing(self) -> int:
        """Tokens that the steps in flight draw, drafts left aside."""
        return sum(row.sample for row in self.flying)

    @property
    def drafting(self) -> int:
        """How many more they draw at most."""
        return sum(row.drafts for row in self.flying)

    def full_hashes(self, num_tokens: int) -> list[BlockHash]:
        """Hashes of the full blocks among the first `num_tokens` tokens."""
        count = num_tokens // BLOCK_TOKENS
        if len(self.hashes) < count:
            extend_hashes(self.hashes, self.tokens, self.space)
        return self.hashes[:count]

    def append(self, token: int, logprobs: TokenLogprobs | None) -> None:
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)

    def settle(self, eos_token_ids: frozenset[int], max_model_len: int) -> bool:
        """Whether the token appended last ends the stream; sets the reason."""
        token, params = self.tokens[-1], self.sampling
        if params.stops(token, self.num_output, eos_token_ids):
            self.finish_reason, self.stop_token = FinishReason.STOP, token
        elif self.num_output >= params.max_tokens or len(self.tokens) >= max_model_len:
            self.finish_reason = FinishReason.LENGTH
        return self.finish_reason is not None

    def first_token(self) -> FirstToken:
        return FirstToken(
            request_id=self.request_id,
            attempt=self.attempt,
            cached_tokens=self.cached_tokens or 0,
            fetched_blocks=self.fetched_blocks,
        )

    def span(self, start: int) -> TokenSpan:
        """The output tokens of this attempt from the `start`-th on, for the tokenizer."""
        first = self.num_prompt + self.num_accepted
        scored = self.sampling.prompt_logprobs is not None and not self.num_accepted + start
        return TokenSpan(
            request_id=self.request_id,
            attempt=self.attempt,
            position=self.num_accepted + start,
            tokens=pack_tokens(self.tokens[first + start :]),
            logprobs=self.logprobs[start:] if self.sampling.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs if scored else None,
            finish_reason=self.finish_reason,
            stop_token=self.stop_token,
            cached_tokens=self.cached_tokens or 0,
            path=self._path(),
            decision=self.decision,
        )

    def _path(self) -> str:
        """Who makes the answer. A stream's headers go out with its first token, so both workers
        are named by then; an answer that ended with it has had the first one only."""
        ended_early = self.handover is not None and self.finish_reason is not None
        return self.path.partition(">")[0] if ended_early else self.path


def unfit(message: Prefill | Decode, worker: WorkerInfo) -> Problem | None:
    """Why a request can run on no worker like this one. The front door has checked it too."""
    try:
        prompt, accepted = unpack_tokens(message.prompt), unpack_tokens(message.accepted)
    except ValueError:
        return Problem(code=ErrorCode.INVALID_VALUE, message="Torn token ids.", param="prompt")
    max_tokens = message.sampling.max_tokens
    wanted = min(len(prompt) + max_tokens, worker.max_model_len)
    full = len(prompt) + len(accepted) >= worker.max_model_len
    if full or blocks_for(wanted) > worker.num_blocks:
        limit = min(worker.max_model_len, worker.num_blocks * BLOCK_TOKENS)
        return Problem(
            code=ErrorCode.CONTEXT_LENGTH,
            message=f"A worker holds {limit} tokens of one request. This one has {len(prompt)} in "
            f"the prompt and asks for {max_tokens} more.",
        )
    tokens = prompt + accepted
    if not prompt or min(tokens) < 0 or max(tokens) >= worker.vocab_size:
        return Problem(
            code=ErrorCode.INVALID_VALUE,
            message=f"Token ids must be in [0, {worker.vocab_size}), at least one.",
            param="prompt",
        )
    return None


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)
