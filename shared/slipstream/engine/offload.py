"""`SaveBlocks` and `LoadBlocks`, done: between the pool and the tiers below it, on one thread."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
from slipstream.kv.segment import Blocks
from slipstream.kv.tier import Moved, TierStore

_LOG = logging.getLogger(__name__)
NAME = "tier"
"""As a transport, in samples and counters."""
SAVE_TIMEOUT_S = 2.0
"""Longest wait for a disk that is behind: meanwhile the pool's blocks are held."""
ROOM_PERIOD_S = 0.002


class Offload:
    """Each effect ends as exactly one event, whatever happens."""

    def __init__(
        self,
        blocks: Blocks,
        kv_layout_id: str,
        *,
        folder: Path | None,
        host_bytes: int,
        disk_bytes: int,
    ):
        """`blocks`: the pool as bytes. StartError: the folder cannot be used."""
        self._blocks = blocks
        self._post: Callable[[Event], None] = lambda event: None
        self._started, self._closing = threading.Event(), threading.Event()
        self.store = TierStore(
            folder, host_bytes, disk_bytes, blocks.shape[1], kv_layout_id, self._tell
        )
        self._thread = ThreadPoolExecutor(1, "offload")

    def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._started.set()

    def execute(self, effect: SaveBlocks | LoadBlocks) -> None:
        if isinstance(effect, SaveBlocks):
            self._thread.submit(self._save, effect)
        else:
            self._thread.submit(self._load, effect)

    def close(self) -> None:
        """Waits for what is under way."""
        self._started.set()
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self.store.close()

    def _save(self, effect: SaveBlocks) -> None:
        deadline_s = time.monotonic() + SAVE_TIMEOUT_S
        try:
            for saved in effect.blocks:
                named = Named(saved.block_hash, saved.position)
                while not self.store.save(named, self._blocks[saved.block], saved.digest):
                    if self._closing.wait(ROOM_PERIOD_S) or time.monotonic() > deadline_s:
                        return  # the rest may come again, if it is hit again
        except Exception:  # noqa: BLE001 its blocks would be held for ever
            _LOG.exception("saving KV blocks failed")
        finally:
            self._post(BlocksSaved(effect.op_id))

    def _load(self, effect: LoadBlocks) -> None:
        began_s = time.monotonic()
        digests: list[bytes] = []
        try:
            for block_hash, local in zip(effect.block_hashes, effect.local_blocks, strict=True):
                digest = self.store.load(block_hash, self._blocks[local])
                if digest is None:
                    break
                digests.append(digest)
        except Exception:  # noqa: BLE001 its request would wait for ever
            _LOG.exception("loading KV blocks failed")
        elapsed_s = time.monotonic() - began_s
        self._post(PullDone(effect.pull_id, tuple(digests), None, NAME, elapsed_s))

    def _tell(self, moved: Sequence[Moved]) -> None:
        """The store's thread; what an earlier process left is there before anybody listens."""
        self._started.wait()
        self._post(BlocksMoved(tuple(BlockMove(*move.block, move.tier) for move in moved)))
