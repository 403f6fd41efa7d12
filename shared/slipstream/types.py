"""Words that every layer shares. Nothing here imports anything of ours."""

import array
import sys
from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

TOKEN_BYTES = 4
"""Of a packed token id: little-endian int32."""

BLOCK_TOKENS = 16
"""Tokens in one KV block; part of every block's identity, so it is a constant and not a setting."""

RequestId: TypeAlias = str
NodeId: TypeAlias = str
"""Name of one process: `prefill-0`. Stays the same over its restarts; the epoch tells them
apart."""

Epoch: TypeAlias = int
"""Start time of a process in ns. Of two epochs for one node the larger is alive, the other
fenced off."""

BlockId: TypeAlias = int
"""Index of a KV block in one worker's pool."""

BlockHash: TypeAlias = bytes
"""16 bytes: identity of a full block's contents (see `core.prefix`)."""


ATTEMPTS_PER_MOVE = 1024
"""Attempts are numbered from 1. The scheduler counts one up for each worker it lost; the frontend
goes to the next multiple when it moves a stream to another tokenizer. So of two tokenizers that
hold one stream, the number says which one the frontend listens to."""

ATTEMPTS_PER_OWNER = 1 << 20
"""A frontend that takes a stream over from another one goes to the next multiple of this: so the
number also says which of two frontends the stream belongs to."""


class Role(StrEnum):
    FRONTEND = "frontend"
    TOKENIZER = "tokenizer"
    SCHEDULER = "scheduler"
    PREFILL = "prefill"
    DECODE = "decode"
    KVINDEX = "kvindex"


def role_of(node_id: NodeId) -> Role | None:
    """By its name, which is the role's, or begins with it and a dash; None for any other name."""
    name = node_id.partition("-")[0]
    return Role(name) if name in list(Role) else None


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one choice of one request is sampled. Bounds are checked again at every decode."""

    max_tokens: Annotated[int, Meta(ge=1)]
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    """Always set: the frontend draws one where the client gave none. Together with `choice` and the
    token's position it keys every random draw, so that any worker draws the same at position n."""
    choice: Annotated[int, Meta(ge=0, le=1 << 16)] = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    """0: off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[tuple[int, ...], Meta(max_length=64)] = ()
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """How many alternatives to report beside the sampled token; None: no logprobs at all."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """The same for each token of the prompt but the first."""
    logit_bias: Annotated[tuple[tuple[int, float], ...], Meta(max_length=1024)] = ()
    """Token id -> what is added to its logit."""
    allowed_token_ids: Annotated[tuple[int, ...], Meta(max_length=65_536)] = ()
    """Nothing else is drawn; empty: everything may be."""
    bad_tokens: Annotated[tuple[tuple[int, ...], ...], Meta(max_length=512)] = ()
    """Sequences that the output must not hold: the last token of one is not drawn after the others.
    The tokenizer writes them, for the words that the client named."""
    grammar: Annotated[str, Meta(max_length=1 << 20)] = ""
    """What the output must follow, as llguidance writes it; empty: nothing. The tokenizer writes
    it."""
    stop: Annotated[tuple[str, ...], Meta(max_length=16)] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_p == 0.0

    def stops(self, token: int, num_output: int, eos_token_ids: frozenset[int]) -> bool:
        """Whether the `num_output`-th token ends the answer.

        A grammar's end is the answer's: there an end of sequence is drawn before its time only if
        nothing else may follow.
        """
        ends = token in eos_token_ids
        stops = token in self.stop_token_ids or (ends and not self.ignore_eos)
        return (stops and num_output > self.min_tokens) or (ends and bool(self.grammar))


class ConstraintKind(StrEnum):
    """What a client may ask its answer to be."""

    JSON = "json"
    """Any JSON object; the text is empty."""
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    """One of the strings of a JSON list."""
    GRAMMAR = "grammar"
    """EBNF as of Lark, or GBNF."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    kind: ConstraintKind
    text: str = ""
    lenient: bool = False
    """Of a schema: what cannot be enforced in it is left out, not refused."""
    param: str = "structured_outputs"
    """The client's field that says so, for refusals."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one sampled token, and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was found instead of computed."""


TRANSPORTS = ("cuda_ipc", "shm", "nixl", "bus")
"""Ways to move KV blocks, in order of preference where nothing has been measured."""


def pack_tokens(tokens: list[int] | tuple[int, ...]) -> bytes:
    """Token ids as little-endian int32, the form in which they cross the wire."""
    packed = array.array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def count_tokens(packed: bytes | bytearray) -> int:
    """How many token ids `packed` holds."""
    return len(packed) // TOKEN_BYTES


def unpack_tokens(packed: bytes) -> list[int]:
    """Inverse of `pack_tokens`. ValueError if the length is not a multiple of 4."""
    tokens = array.array("i")
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()
