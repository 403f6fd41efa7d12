"""A tier below a simulated pool: small, sometimes slow, sometimes it refuses, drops or flips."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from slipstream.core import machine as m
from slipstream.types import BlockHash

if TYPE_CHECKING:
    from sim.world import Process

CAPACITY = 12
COPY_S = 0.002
HANG_S = 40.0


class Tier:
    def __init__(self, process: Process):
        self.process = process
        self.blocks: OrderedDict[BlockHash, tuple[int, list[int], bytes]] = OrderedDict()

    def save(self, effect: m.SaveBlocks) -> None:
        self.process.unless_frozen(COPY_S * self._slowness(), lambda: self._save(effect))

    def load(self, effect: m.LoadBlocks) -> None:
        hangs = self.process.world.faults.strikes("hang", 0.05, self.process.world.now_s)
        delay_s = HANG_S if hangs else COPY_S * self._slowness()
        self.process.unless_frozen(delay_s, lambda: self._load(effect, delay_s))

    def _save(self, effect: m.SaveBlocks) -> None:
        device, world = self.process.device, self.process.world
        assert device is not None
        moved = []
        for saved in effect.blocks:
            if world.faults.strikes("loss", 0.1, world.now_s):
                continue
            slots = list(device.memory[saved.block])
            digest = saved.digest or device.digest(saved.block)
            if world.faults.strikes("corruption", 0.1, world.now_s):
                slots[3] ^= 1
            self.blocks[saved.block_hash] = saved.position, slots, digest
            moved.append(m.BlockMove(saved.block_hash, saved.position, 1))
        while len(self.blocks) > CAPACITY:
            moved.append(self._drop(next(iter(self.blocks))))
        self.process.post(m.BlocksSaved(effect.op_id))
        self.process.post(m.BlocksMoved(tuple(moved)))

    def _load(self, effect: m.LoadBlocks, elapsed_s: float) -> None:
        device = self.process.device
        assert device is not None
        digests = []
        self.process.check_held(effect.local_blocks)
        for block_hash, local in zip(effect.block_hashes, effect.local_blocks, strict=True):
            if block_hash not in self.blocks:
                break
            self.blocks.move_to_end(block_hash)
            _, slots, digest = self.blocks[block_hash]
            device.memory[local][:] = slots
            if device.digest(local) != digest:
                self.process.post(m.BlocksMoved((self._drop(block_hash),)))
                break
            digests.append(digest)
        done = m.PullDone(effect.pull_id, tuple(digests), transport="tier", elapsed_s=elapsed_s)
        self.process.post(done)

    def _drop(self, block_hash: BlockHash) -> m.BlockMove:
        position, _, _ = self.blocks.pop(block_hash)
        return m.BlockMove(block_hash, position, None)

    def _slowness(self) -> int:
        return self.process.world.network.choice((1, 1, 1, 30, 4000))
