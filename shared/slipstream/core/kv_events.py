"""What a pool stores and gives up, in the words of vLLM's KV events, for routers that are not ours.

The structs are vLLM 0.32's, field by field, as far as we have something to say. A block's hash is
ours: 16 bytes. They tell of every block: no stride thins them.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec

from slipstream.core.blocks import BlockPool, Named
from slipstream.types import BLOCK_TOKENS, BlockHash

POOL_MEDIUM = "GPU"
"""What vLLM calls the pool, on CPUs too."""
TIER_MEDIA = {1: "CPU", 2: "STORAGE"}


class BlockStored(msgspec.Struct, frozen=True, kw_only=True, tag="BlockStored", omit_defaults=True):
    """Blocks that follow one another. In a tier below the pool: without parent and tokens."""

    block_hashes: tuple[BlockHash, ...]
    parent_block_hash: BlockHash | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None


class BlockRemoved(
    msgspec.Struct, frozen=True, kw_only=True, tag="BlockRemoved", omit_defaults=True
):
    block_hashes: tuple[BlockHash, ...]
    medium: str


class AllBlocksCleared(msgspec.Struct, frozen=True, tag="AllBlocksCleared"):
    """The worker has begun anew."""


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class KvEvents:
    """Collects what happens between two calls of `flush`."""

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self._told: set[BlockHash] = set()
        """Of those in the pool."""
        self._lower: dict[BlockHash, str] = {}
        self._events: list[KvEvent] = [AllBlocksCleared()]

    def cached(self, tokens: Sequence[int], hashes: Sequence[BlockHash]) -> None:
        """These leading blocks of `tokens` may have come into the pool."""
        first = 0
        for position in range(len(hashes) + 1):
            new = position < len(hashes) and self._is_new(hashes[position])
            if not new:
                if first < position:
                    self._stored(tokens, hashes, first, position)
                first = position + 1

    def changed(self, blocks: Iterable[Named]) -> None:
        """These came or went; the pool knows which."""
        removed = [h for h, _ in blocks if h in self._told and h not in self.pool]
        self._told.difference_update(removed)
        self._removed(removed, POOL_MEDIUM)

    def moved(self, block_hash: BlockHash, tier: int | None) -> None:
        """It is in this tier, and no more in another one below the pool; None: in none."""
        medium = None if tier is None else TIER_MEDIA.get(tier, TIER_MEDIA[2])
        before = self._lower.pop(block_hash, None)
        if before not in (None, medium):
            self._removed([block_hash], before or "")
        if medium is None:
            return
        self._lower[block_hash] = medium
        if before != medium:
            self._events.append(_stored((block_hash,), None, (), medium))

    def flush(self) -> tuple[KvEvent, ...]:
        events, self._events = self._events, []
        return tuple(events)

    def _is_new(self, block_hash: BlockHash) -> bool:
        return block_hash not in self._told and block_hash in self.pool

    def _stored(
        self, tokens: Sequence[int], hashes: Sequence[BlockHash], first: int, end: int
    ) -> None:
        self._told.update(hashes[first:end])
        self._events.append(
            _stored(
                tuple(hashes[first:end]),
                hashes[first - 1] if first else None,
                tuple(tokens[first * BLOCK_TOKENS : end * BLOCK_TOKENS]),
                POOL_MEDIUM,
            )
        )

    def _removed(self, hashes: Sequence[BlockHash], medium: str) -> None:
        if hashes:
            self._events.append(BlockRemoved(block_hashes=tuple(hashes), medium=medium))


def _stored(
    hashes: tuple[BlockHash, ...],
    parent: BlockHash | None,
    tokens: tuple[int, ...],
    medium: str,
) -> BlockStored:
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=parent,
        token_ids=tokens,
        block_size=BLOCK_TOKENS if tokens else 0,
        lora_id=None,
        medium=medium,
        lora_name=None,
    )
