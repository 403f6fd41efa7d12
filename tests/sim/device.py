"""A fake accelerator: its KV is a chain of hashes, its tokens are hashes of all KV before them.

It reads and writes KV only through block tables, as the real one does. A block that was freed too
early, torn by a READ, taken from a wrong prefix or never computed changes the next token.
"""

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


def _sample(blocks: list[int], tail: list[int], params: SamplingParams, position: int) -> int:
    key = (*blocks, *tail, params.seed, params.choice, position)
    return (hash(key) >> 7) % VOCAB


def _logprob(token: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(token + position))


class Device:
    """One worker's memory and what its runner remembers of each request."""

    def __init__(self, num_blocks: int):
        self.memory = [[0] * BLOCK_TOKENS for _ in range(num_blocks)]
        self._admitted: dict[tuple[RequestId, int], Admission] = {}

    def admit(self, plan: BatchPlan) -> None:
        for key in plan.dropped:
            del self._admitted[key]
        for admission in plan.admitted:
            self._admitted[admission.request_id, admission.attempt] = admission

    def run(self, plan: BatchPlan) -> tuple[tuple[RowOutput, ...], dict[BlockId, bytes]]:
        outputs = tuple(self._row(row) for row in plan.rows)
        digests = {block: self.digest(block) for block in plan.digest_blocks}
        return tuple(output for output in outputs if output is not None), digests

    def digest(self, block: BlockId) -> bytes:
        return (hash(tuple(self.memory[block])) & (1 << 128) - 1).to_bytes(16, "little")

    def _row(self, row: Row) -> RowOutput | None:
        admission = self._admitted[row.request_id, row.attempt]
        table = [self.memory[block] for block in row.block_ids]
        for offset, token in enumerate(row.tokens):
            at = row.start + offset
            previous = table[(at - 1) // BLOCK_TOKENS][(at - 1) % BLOCK_TOKENS] if at else 1
            table[at // BLOCK_TOKENS][at % BLOCK_TOKENS] = _mix(previous, token)
        if not row.sample:
            return None
        full, rest = divmod(row.start + len(row.tokens), BLOCK_TOKENS)
        blocks = [hash(tuple(slots)) for slots in table[:full]]
        tail = table[full][:rest] if rest else []
        token = _sample(blocks, tail, admission.sampling, row.position)
        logprobs = None
        if admission.sampling.logprobs is not None:
            logprobs = (_logprob(token, row.position),)
        return RowOutput(row.request_id, row.attempt, (token,), logprobs)


def right_answer(prompt: list[int], params: SamplingParams) -> tuple[list[int], FinishReason]:
    """What one undisturbed machine would have generated."""
    blocks: list[int] = []
    tail: list[int] = []
    previous = 1
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
        if token == EOS and not params.ignore_eos and len(output) > params.min_tokens:
            return output, FinishReason.STOP
        if len(output) == params.max_tokens:
            return output, FinishReason.LENGTH
        pending = [token]
