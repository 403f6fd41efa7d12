"""A fake accelerator: its KV is a chain of hashes, its tokens are hashes of all KV before them.

It reads and writes KV only through block tables, as the real one does. A block that was freed too
early, torn by a READ, taken from a wrong prefix or never computed changes the next token.
"""

import zlib

from slipstream.core.machine import Admission, BatchPlan, Row, RowOutput
from slipstream.types import (
    BLOCK_TOKENS,
    BlockId,
    FinishReason,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)

VOCAB = 64
EOS = 0
_MASK = (1 << 61) - 1


def _mix(previous: int, token: int) -> int:
    return ((previous ^ (token + 0x9E3779B9)) * 0x2545F4914F6CDD1D + 1) & _MASK


def _first(model: str, adapter: str = "") -> int:
    """What a chain begins with: another one for each model, with and without an adapter."""
    return 1 + zlib.crc32(f"{model}@{adapter}".encode())


def _sample(blocks: list[int], tail: list[int], params: SamplingParams, position: int) -> int:
    held_to = zlib.crc32(params.grammar.encode()), *params.bad_tokens
    key = (*blocks, *tail, params.seed, params.choice, position, *held_to)
    return (hash(key) >> 7) % VOCAB


def _logprob(token: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(token + position))


def _scores(tokens: list[int], row: Row) -> tuple[TokenLogprobs, ...]:
    first = row.start + 1
    return tuple(_logprob(tokens[i], i) for i in range(first, first + row.prompt_logprobs))


def prompt_scores(prompt: list[int]) -> list[TokenLogprobs]:
    """What is to be heard of a prompt's tokens but the first."""
    return [_logprob(token, i) for i, token in enumerate(prompt) if i]


class Device:
    """One worker's memory and what its runner remembers of each request."""

    def __init__(self, num_blocks: int, model: str = "fake"):
        self._model = model
        self.adapters: set[str] = set()
        self.memory = [[0] * BLOCK_TOKENS for _ in range(num_blocks)]
        self._admitted: dict[tuple[RequestId, int], Admission] = {}
        self._tokens: dict[tuple[RequestId, int], list[int]] = {}
        self._lost: set[tuple[RequestId, int]] = set()
        """In a step that failed, and not told to be forgotten yet."""

    def admit(self, plan: BatchPlan) -> None:
        for key in plan.dropped:
            del self._admitted[key], self._tokens[key]
            self._lost.discard(key)
        for admission in plan.admitted:
            key = admission.request_id, admission.attempt
            assert admission.adapter in self.adapters | {""}, admission
            self._admitted[key], self._tokens[key] = admission, list(admission.tokens)

    def fail(self, plan: BatchPlan) -> None:
        self._lost |= {(row.request_id, row.attempt) for row in plan.rows}

    def run(self, plan: BatchPlan) -> tuple[tuple[RowOutput, ...], dict[BlockId, bytes]]:
        outputs = tuple(self._row(row) for row in plan.rows)
        digests = {block: self.digest(block) for block in plan.digest_blocks}
        return tuple(output for output in outputs if output is not None), digests

    def digest(self, block: BlockId) -> bytes:
        return (hash(tuple(self.memory[block])) & (1 << 128) - 1).to_bytes(16, "little")

    def _row(self, row: Row) -> RowOutput | None:
        key = row.request_id, row.attempt
        if key in self._lost:
            wanted = row.sample or row.prompt_logprobs
            return RowOutput(*key, (), None, _scores(self._tokens[key], row)) if wanted else None
        admission, tokens = self._admitted[key], self._tokens[key]
        table = [self.memory[block] for block in row.block_ids]
        assert admission.adapter in self.adapters | {""}, admission
        first = _first(self._model, admission.adapter)
        inputs, at = row.tokens, row.start
        if row.after_previous:
            inputs, at = (tokens[-1],), len(tokens) - 1
            assert at >= row.start and not row.tokens
        elif row.sample:
            del tokens[admission.num_prompt + row.position :]
        for offset, token in enumerate(inputs):
            _write(table, at + offset, token, first)
        scores = _scores(tokens, row)
        if not row.sample:
            return RowOutput(*key, (), None, scores) if scores else None
        drawn: list[int] = []
        for draft in range(row.drafts + 1):
            end = at + len(inputs) + draft
            token = _draw(table, end, admission, len(tokens) - admission.num_prompt)
            tokens.append(token)
            drawn.append(token)
            if draft == row.drafts:
                break
            right = hash((token, end)) % 3 != 0
            _write(
                table, end, token if right else token + 1, first
            )  # proposed, computed all the same
            if not right:
                break
        logprobs = None
        if admission.sampling.logprobs is not None:
            before = len(tokens) - len(drawn) - admission.num_prompt
            logprobs = tuple(_logprob(token, before + i) for i, token in enumerate(drawn))
        return RowOutput(*key, tuple(drawn), logprobs, scores, row.drafts)


def _write(table: list[list[int]], at: int, token: int, first: int) -> None:
    previous = table[(at - 1) // BLOCK_TOKENS][(at - 1) % BLOCK_TOKENS] if at else first
    table[at // BLOCK_TOKENS][at % BLOCK_TOKENS] = _mix(previous, token)


def _draw(table: list[list[int]], end: int, admission: Admission, position: int) -> int:
    full, rest = divmod(end, BLOCK_TOKENS)
    blocks = [hash(tuple(slots)) for slots in table[:full]]
    return _sample(blocks, table[full][:rest] if rest else [], admission.sampling, position)


def right_answer(
    prompt: list[int], params: SamplingParams, model: str = "fake", adapter: str = ""
) -> tuple[list[int], FinishReason]:
    """What one undisturbed machine would have generated."""
    blocks: list[int] = []
    tail: list[int] = []
    previous = _first(model, adapter)
    output: list[int] = []
    pending = prompt
    while True:
        for token in pending:
            previous = _mix(previous, token)
            tail.append(previous)
            if len(tail) == BLOCK_TOKENS:
                blocks.append(hash(tuple(tail)))
                tail = []
        token = _sample(blocks, tail, params, len(output))
        output.append(token)
        if params.stops(token, len(output), frozenset((EOS,))):
            return output, FinishReason.STOP
        if len(output) == params.max_tokens:
            return output, FinishReason.LENGTH
        pending = [token]
