"""Digest of a block's bytes: how a reader knows that it has what the source announced."""

from collections.abc import Iterable

from slipstream.kernels.verified_copy import DIGEST_BYTES, digests
from slipstream.kv.device import DeviceBlocks, PoolBlocks
from slipstream.types import BlockId

__all__ = ["DIGEST_BYTES", "block_digests"]


def block_digests(blocks: PoolBlocks, ids: Iterable[BlockId]) -> tuple[bytes, ...]:
    """XXH3-128 over all bytes of each block, 16 bytes a block. IndexError: no such block.

    Not cryptographic: it guards against torn, late, misplaced and flipped bytes, not against a
    forger. Readers compute it while they copy (`kernels.verified_copy`), where it costs nothing
    that can be measured; alone it runs at the speed of memory. The GIL is released.
    """
    rows = tuple(ids)
    return blocks.digests(rows) if isinstance(blocks, DeviceBlocks) else digests(blocks, rows)
