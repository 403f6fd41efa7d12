"""Token ids of a trace's prompts: equal hash ids, equal tokens. Pure."""

from array import array
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

import msgspec

from slipstream.loadtest.versus.loads import prompt as drawn
from slipstream.simulate.trace import CHUNK_TOKENS, TraceRequest
from slipstream.types import BLOCK_TOKENS


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How a trace is made to fit a model and a machine."""

    chunk_tokens: int = CHUNK_TOKENS
    """What stands for the 512 tokens of a hash id; lengths shrink with it, prefixes stay shared."""
    max_prompt_tokens: int = 0
    """What is longer loses its end; 0: nothing does."""
    max_output_tokens: int = 0

    def prompt_tokens(self, request: TraceRequest) -> int:
        scaled = max(1, round(request.prompt_tokens * self.chunk_tokens / CHUNK_TOKENS))
        return min(scaled, self.max_prompt_tokens or scaled)

    def output_tokens(self, request: TraceRequest) -> int:
        return min(request.output_tokens, self.max_output_tokens or request.output_tokens)


def token_ids(request: TraceRequest, size: Size) -> list[int]:
    tokens = size.prompt_tokens(request)
    found: list[int] = []
    for chunk in request.chunks:
        if len(found) >= tokens:
            break
        found += _chunk(chunk, size.chunk_tokens)
    return found[:tokens]


@lru_cache(maxsize=4096)
def _chunk(chunk: int, tokens: int) -> list[int]:
    return drawn(f"chunk {chunk}", tokens)


def reusable_tokens(prompts: Iterable[list[int]]) -> int:
    """What one cache without end would have had, in full blocks; as in a worker, the last token of
    a prompt is computed in any case."""
    seen: set[bytes] = set()
    total = 0
    for prompt in prompts:
        name, hit = b"", 0
        for begin in range(0, len(prompt) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = array("I", prompt[begin : begin + BLOCK_TOKENS]).tobytes()
            name = blake2b(name + block, digest_size=16).digest()
            hit += BLOCK_TOKENS * (name in seen)
            seen.add(name)
        total += min(hit, (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
    return total
