"""A device whose memory is the host's, by other addresses."""

import ctypes

import numpy as np

from slipstream.kv.cuda_driver import CudaError
from slipstream.kv.device import DeviceBlocks, Kernels
from slipstream.kv.segment import Blocks

DEVICE_STEP = 1 << 50
"""Device pointers are the host's plus this, so that one taken for the other does not work."""


class FakeDriver:
    """Its copies happen at `wait`, or later."""

    def __init__(self) -> None:
        self.cards: list[np.ndarray] = []
        self.opened: list[int] = []
        self.queued: list[tuple[int, int, int]] = []
        self.fails = ""
        self.gpu = 0
        """Of what peers have."""
        self.copies_left = 1 << 30
        """How many more it takes."""

    def allocate(self, content: bytes) -> int:
        self.cards.append(np.frombuffer(bytearray(content), np.uint8))
        return int(self.cards[-1].ctypes.data) + DEVICE_STEP

    def pinned(self, num_bytes: int) -> Blocks:
        return np.zeros(num_bytes, np.uint8)

    def export(self, pointer: int) -> bytes:
        return pointer.to_bytes(64, "little")

    def open(self, handle: bytes) -> int:
        if self.fails:
            raise CudaError(self.fails)
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def gpu_of(self, pointer: int) -> int:
        return self.gpu

    def shut(self, pointer: int) -> None:
        self.opened.remove(pointer)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        if not self.copies_left:
            raise CudaError("an invalid argument")
        self.copies_left -= 1
        self.queued.append((target, source, num_bytes))

    def wait(self) -> None:
        if self.fails:
            raise CudaError(self.fails)
        for target, source, num_bytes in self.queued:
            ctypes.memmove(target % DEVICE_STEP, source % DEVICE_STEP, num_bytes)
        self.queued.clear()


def on_device(
    blocks: Blocks, driver: FakeDriver | None = None, kernels: Kernels | None = None
) -> DeviceBlocks:
    """Such memory, which the host has as `blocks`."""
    pointer = int(blocks.ctypes.data) + DEVICE_STEP
    return DeviceBlocks(driver or FakeDriver(), pointer, *blocks.shape, kernels=kernels)
