"""Host memory below one worker's pool: what lies in it, and how long copies take.

One copy at a time in each direction; the least recently used block makes room.
"""

from collections import OrderedDict

from slipstream.core import machine as m
from slipstream.simulate.hardware import Hardware
from slipstream.types import BlockHash

HOST_TIER = 1


class HostTier:
    def __init__(self, hardware: Hardware, num_blocks: int):
        self.hardware, self.num_blocks = hardware, num_blocks
        self._positions: OrderedDict[BlockHash, int] = OrderedDict()
        self._way_down_s = self._way_up_s = 0.0

    def save(self, blocks: tuple[m.SavedBlock, ...]) -> tuple[m.BlockMove, ...]:
        """Takes all of them; what came in and what had to go."""
        moved: dict[BlockHash, m.BlockMove] = {}
        for saved in blocks:
            self._positions[saved.block_hash] = saved.position
            self._positions.move_to_end(saved.block_hash)
            moved[saved.block_hash] = m.BlockMove(saved.block_hash, saved.position, HOST_TIER)
        while len(self._positions) > self.num_blocks:
            block_hash, position = self._positions.popitem(last=False)
            moved[block_hash] = m.BlockMove(block_hash, position, None)
        return tuple(moved.values())

    def load(self, hashes: tuple[BlockHash, ...]) -> int:
        """How many leading ones are there."""
        for count, block_hash in enumerate(hashes):
            if block_hash not in self._positions:
                return count
            self._positions.move_to_end(block_hash)
        return len(hashes)

    def down_s(self, num_blocks: int, now_s: float) -> float:
        """When a copy out of the pool that begins now is over."""
        self._way_down_s = max(now_s, self._way_down_s) + self.hardware.host_s(num_blocks)
        return self._way_down_s

    def up_s(self, num_blocks: int, now_s: float) -> float:
        """The same into the pool."""
        self._way_up_s = max(now_s, self._way_up_s) + self.hardware.host_s(num_blocks)
        return self._way_up_s
