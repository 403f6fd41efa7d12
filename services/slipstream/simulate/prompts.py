"""Token ids and block hashes of a trace's prompts: equal chunks give equal tokens, others differ.

A chunk's first two tokens spell its id; what follows tells chunks apart by the chain of hashes.
"""

from slipstream.core.prefix import HASH_BYTES, extend_hashes, namespace
from slipstream.simulate.trace import CHUNK_TOKENS, TraceRequest
from slipstream.types import BLOCK_TOKENS, TOKEN_BYTES, BlockHash, pack_tokens

_FILL = [0] * (CHUNK_TOKENS - 2)
_PACKED_FILL = pack_tokens(_FILL)


class Prompts:
    """`vocab_size - 1` is left out: generated tokens are that one, so that nothing generated is
    taken for a prompt."""

    def __init__(self, vocab_size: int, kv_layout_id: str):
        self._base = vocab_size - 1
        self._space = namespace(kv_layout_id, "")
        self._chains: dict[tuple[BlockHash, int], bytes] = {}

    def packed(self, request: TraceRequest) -> bytes:
        """Token ids as they cross the wire."""
        chunks = [pack_tokens(self._name(chunk)) + _PACKED_FILL for chunk in request.chunks]
        return b"".join(chunks)[: request.prompt_tokens * TOKEN_BYTES]

    def hashes(self, request: TraceRequest) -> bytes:
        """Of the full blocks."""
        parts: list[bytes] = []
        parent = b""
        for chunk in request.chunks:
            chain = self._chains.get((parent, chunk))
            if chain is None:
                chain = self._chains[parent, chunk] = self._chain(parent, chunk)
            parts.append(chain)
            parent = chain[-HASH_BYTES:]
        return b"".join(parts)[: request.prompt_tokens // BLOCK_TOKENS * HASH_BYTES]

    def _name(self, chunk: int) -> tuple[int, int]:
        high, low = divmod(chunk, self._base)
        return low, high

    def _chain(self, parent: BlockHash, chunk: int) -> bytes:
        tokens = [*self._name(chunk), *_FILL]
        hashes = [parent] if parent else []
        # What is hashed already need not be known: any tokens stand for it.
        extend_hashes(hashes, [0] * (BLOCK_TOKENS * len(hashes)) + tokens, self._space)
        return b"".join(hashes[1:] if parent else hashes)
