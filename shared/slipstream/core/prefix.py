"""Identity of KV blocks: a chain of hashes, the same on every machine and in every process.

SHA-256 over (namespace, parent, 16 token ids), cut to 128 bits. The namespace holds everything else
that changes the bytes: model, dtype, block layout, adapter with its version, and the client's cache
salt.
"""

import hashlib
from collections.abc import Sequence

from slipstream.types import BLOCK_TOKENS, TOKEN_BYTES, BlockHash, pack_tokens

HASH_BYTES = 16
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


def namespace(kv_layout_id: str, salt: str, adapter: str = "") -> bytes:
    parts = ["slipstream-kv-1", kv_layout_id, salt, *([adapter] if adapter else [])]
    return hashlib.sha256("\0".join(parts).encode()).digest()


def extend_hashes(hashes: list[BlockHash], tokens: Sequence[int], space: bytes) -> None:
    """Append the hashes of the full blocks of `tokens` that `hashes` does not cover yet."""
    parent = hashes[-1] if hashes else b""
    fresh = pack_tokens(list(tokens[len(hashes) * BLOCK_TOKENS :]))
    for start in range(0, len(fresh) - BLOCK_BYTES + 1, BLOCK_BYTES):
        block = fresh[start : start + BLOCK_BYTES]
        parent = hashlib.sha256(space + parent + block).digest()[:HASH_BYTES]
        hashes.append(parent)


def block_hashes(tokens: Sequence[int], space: bytes) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, tokens, space)
    return hashes


def split_hashes(packed: bytes) -> list[BlockHash]:
    """Inverse of `b"".join(hashes)`. ValueError on a torn string."""
    if len(packed) % HASH_BYTES:
        raise ValueError(
            f"packed hashes are {len(packed)} bytes long, not a multiple of {HASH_BYTES}"
        )
    return [packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES)]
