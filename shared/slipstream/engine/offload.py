"""`SaveBlocks` and `LoadBlocks`, done: between the pool and the tiers below it. Nobody who loads
waits for a disk that is written to: saves have a thread of their own."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from slipstream.core.blocks import Named
from slipstream.core.machine import (
    BlockMove,
    BlocksMoved,
    BlocksSaved,
    Event,
    LoadBlocks,
    PullDone,
    SaveBlocks,
)
from slipstream.engine.effect_threads import EffectThreads
from slipstream.kv.device import DeviceBlocks, PoolBlocks, load, store
from slipstream.kv.tier import Moved, TierStore
from slipstream.types import BlockHash, BlockId

NAME = "tier"
"""As a transport, in samples and counters."""
SAVE_TIMEOUT_S = 2.0
"""Longest wait for a disk that is behind: meanwhile the pool's blocks are held."""


class Offload:
    """Each effect ends as exactly one event, whatever happens."""

    def __init__(
        self,
        blocks: PoolBlocks,
        kv_layout_id: str,
        *,
        folder: Path | None,
        host_bytes: int,
        disk_bytes: int,
    ):
        """`blocks`: the pool as bytes. StartError: the folder cannot be used."""
        self._blocks = blocks
        self._post: Callable[[Event], None] = lambda event: None
        self._started = threading.Event()
        self.store = TierStore(
            folder, host_bytes, disk_bytes, blocks.shape[1], kv_layout_id, self._tell
        )
        self._saves, self._loads = EffectThreads(1, "save"), EffectThreads(1, "load")

    def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._started.set()

    def execute(self, effect: SaveBlocks | LoadBlocks) -> None:
        if isinstance(effect, SaveBlocks):
            saved = BlocksSaved(effect.op_id)
            self._saves.submit(
                *(self._post, "saving KV blocks"),
                work=lambda: self._save(effect, saved),
                failed=lambda _: saved,
            )
        else:
            began_s, digests = time.monotonic(), list[bytes]()
            self._loads.submit(
                *(self._post, "loading KV blocks"),
                work=lambda: self._load(effect, digests, began_s),
                failed=lambda _: _loaded(effect, digests, began_s),
            )

    def close(self) -> None:
        """Waits for what is under way."""
        self._started.set()
        self._saves.cancel()
        self._loads.close()
        self.store.close()  # nobody waits for room in it any more
        self._saves.close()

    def _save(self, effect: SaveBlocks, saved: BlocksSaved) -> BlocksSaved:
        deadline_s = time.monotonic() + SAVE_TIMEOUT_S
        for block in effect.blocks:
            named = Named(block.block_hash, block.position)
            (data,) = load(self._blocks, [block.block])
            if not self.store.save(named, data, block.digest, deadline_s - time.monotonic()):
                break  # the rest may come again, if it is hit again
        return saved

    def _load(self, effect: LoadBlocks, digests: list[bytes], began_s: float) -> PullDone:
        for block_hash, local in zip(effect.block_hashes, effect.local_blocks, strict=True):
            digest = self._load_one(block_hash, local)
            if digest is None:
                break
            digests.append(digest)
        return _loaded(effect, digests, began_s)

    def _load_one(self, block_hash: BlockHash, local: BlockId) -> bytes | None:
        if not isinstance(self._blocks, DeviceBlocks):
            return self.store.load(block_hash, self._blocks[local])
        read = np.empty((1, self._blocks.shape[1]), np.uint8)
        if self.store.load(block_hash, read[0]) is None:
            return None
        (digest,) = store(read, [0], self._blocks, [local], True)
        return digest

    def _tell(self, moved: Sequence[Moved]) -> None:
        """The store's thread; what an earlier process left is there before anybody listens."""
        self._started.wait()
        self._post(BlocksMoved(tuple(BlockMove(*move.block, move.tier) for move in moved)))


def _loaded(effect: LoadBlocks, digests: Sequence[bytes], began_s: float) -> PullDone:
    """`digests`: of those that were there, from the first on."""
    return PullDone(effect.pull_id, tuple(digests), None, NAME, time.monotonic() - began_s)
