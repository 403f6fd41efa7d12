"""The pool of KV blocks as numbers: references, prefix cache, eviction order.

A block is in exactly one of three conditions:
  empty      no reference, no content worth anything
  cached     no reference, but its hash is known: a prefix may take it up again; evicted LRU first
  referenced one or more requests, leases or READs hold it; its hash may be known too
The free list is the cache (nano-vllm's idea): a block given back keeps its hash until it is needed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from slipstream.types import BlockHash, BlockId


class Named(NamedTuple):
    """What a cached block is: its hash, and how many blocks of its prompt come before it."""

    block_hash: BlockHash
    position: int


class BlockPool:
    def __init__(self, num_blocks: int, caching: bool = True, hot_hits: int | None = None):
        """`hot_hits`: how often a block has to be hit to be hot; 0: each one is; None: none."""
        assert num_blocks > 0
        self._hot_hits = hot_hits
        self._hits = [0] * num_blocks
        self._hot: list[BlockId] = []
        self.num_blocks, self.caching = num_blocks, caching
        self.references = [0] * num_blocks
        self.digests: list[bytes | None] = [None] * num_blocks
        """Digest of each full block's bytes, where one was computed since it was last written."""
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._positions = [0] * num_blocks
        self._block_of: dict[BlockHash, BlockId] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._changed: dict[BlockHash, int] = {}
        """Hash -> position of what came or went since `drain_changes`."""
        self.evicted = 0

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._empty) + len(self._cached)

    @property
    def num_empty(self) -> int:
        return len(self._empty)

    def count_hashed(self, among: Iterable[BlockId] | None = None) -> int:
        """Blocks that a prefix can hit, referenced or not: all of them, or of those named."""
        if among is None:
            return len(self._block_of)
        return sum(self._hash_of[block] is not None for block in among)

    def match(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """The longest run of leading blocks that are in the pool.

        Takes no reference: valid until the next `allocate`.
        """
        run: list[BlockId] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            run.append(block)
        return run

    def take(self, blocks: Iterable[BlockId]) -> None:
        """One more reference on each block, which must be cached or referenced."""
        for block in blocks:
            if self.references[block] == 0:
                del self._cached[block]
            self.references[block] += 1

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` blocks with one reference each and no content, or None (and no change)."""
        if count > self.num_available:
            return None
        blocks: list[BlockId] = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
                self.evicted += 1
            assert self.references[block] == 0 and self._hash_of[block] is None
            self.references[block] = 1
            self.digests[block] = None
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Give back one reference on each. The tail is evicted before the head that it builds
        on."""
        for block in reversed(blocks):
            assert self.references[block] > 0, f"block {block} released twice"
            self.references[block] -= 1
            if self.references[block]:
                continue
            if self._hash_of[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def commit(self, block: BlockId, block_hash: BlockHash, position: int) -> bool:
        """The block is full and its KV is valid: a prefix may use it from now on. False if it was
        so before.

        `position`: how many blocks of its prompt come before it. Of two blocks with the same
        content the first one stays the one that is found.
        """
        assert self.references[block] > 0
        if not self.caching or self._hash_of[block] is not None or block_hash in self._block_of:
            return False
        self._hash_of[block] = block_hash
        self._positions[block] = position
        self._block_of[block_hash] = block
        self._changed[block_hash] = position
        self._hits[block] = 0
        if self._hot_hits == 0:
            self._hot.append(block)
        return True

    def hit(self, blocks: Iterable[BlockId]) -> None:
        """Somebody found these by their prefix, and uses them."""
        if self._hot_hits:
            for block in blocks:
                self._hits[block] += 1
                if self._hits[block] % self._hot_hits == 0:
                    self._hot.append(block)

    def drain_hot(self) -> list[BlockId]:
        """Blocks that became hot since the last call."""
        hot, self._hot = self._hot, []
        return hot

    def name_of(self, block: BlockId) -> Named | None:
        """What a prefix finds in it; None if it is not found."""
        block_hash = self._hash_of[block]
        return None if block_hash is None else Named(block_hash, self._positions[block])

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._block_of

    def named(self) -> list[Named]:
        """All that a prefix can hit."""
        return [Named(h, self._positions[block]) for h, block in self._block_of.items()]

    def hashes(self) -> list[BlockHash]:
        return list(self._block_of)

    def drain_changes(self) -> list[Named]:
        """What came or went since the last call; whether it is there now, `in` says."""
        changed, self._changed = self._changed, {}
        return [Named(*change) for change in changed.items()]

    def check(self) -> None:
        empty, cached = set(self._empty), set(self._cached)
        assert len(empty) == len(self._empty) and not empty & cached
        for block in range(self.num_blocks):
            held = self.references[block] > 0
            assert held + (block in empty) + (block in cached) == 1, f"block {block} in two places"
            assert block not in empty or self._hash_of[block] is None
            assert block not in cached or self._hash_of[block] is not None
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash

    def _forget(self, block: BlockId) -> None:
        block_hash = self._hash_of[block]
        assert block_hash is not None
        self._hash_of[block] = None
        del self._block_of[block_hash]
        self._changed[block_hash] = self._positions[block]
