"""A pool in a GPU's memory, as bytes. What the host wants of them goes through pinned memory of its
own; needs no torch."""

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from slipstream.kernels.verified_copy import digests, verified_copy
from slipstream.kv.cuda_driver import CudaDriver, CudaError
from slipstream.kv.segment import Blocks, SegmentHeader

STAGING_BYTES = 4 << 20
"""Pinned, of one pool, unless a single block is larger."""

Copy: TypeAlias = tuple[int, int, int]
"""Target, source, bytes."""


class Kernels(Protocol):
    """Copies and digests (XXH3-128) that a GPU makes itself. CudaError: it refused."""

    def copy(
        self,
        source: int,
        count: int,
        source_rows: Sequence[int],
        into: "DeviceBlocks",
        rows: Sequence[int],
        digest: bool,
    ) -> tuple[bytes, ...]:
        """As `verified_copy`, from `count` blocks at `source`, on the same GPU; waited for."""
        ...

    def digests(self, blocks: "DeviceBlocks", rows: Sequence[int]) -> tuple[bytes, ...]: ...


class Driver(Protocol):
    """`cuda_driver.CudaDriver`, or its stand-in in tests. Raises CudaError."""

    def pinned(self, num_bytes: int) -> Blocks: ...
    def copy(self, target: int, source: int, num_bytes: int) -> None: ...
    def wait(self) -> None: ...


class Lane:
    """Copies on a stream; one caller at a time."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.lost: CudaError | None = None
        """The device's last word: nobody can say what becomes of copies."""

    def carry_out(self, copies: Iterable[Copy]) -> None:
        """To their end. Whatever goes wrong meanwhile, nothing is being copied any more when this
        returns: targets are given to others then.

        CudaError: some of it was not copied. A device that cannot even say when it is at rest
        computes nothing further for this process, by CUDA's rules, and is not asked again.
        """
        if self.lost is not None:
            raise self.lost
        try:
            for target, source, num_bytes in copies:
                self._driver.copy(target, source, num_bytes)
        finally:
            try:
                self._driver.wait()
            except CudaError as error:
                self.lost = error
                raise


class DeviceBlocks:
    """`Blocks` that the host cannot touch: `shape` is theirs. Any thread; CudaError."""

    def __init__(
        self,
        driver: Driver,
        pointer: int,
        num_blocks: int,
        block_bytes: int,
        gpu: int = 0,
        kernels: Kernels | None = None,
    ) -> None:
        """`driver`: of a stream that nobody else uses, on GPU `gpu`. Without `kernels` blocks are
        read back to be digested: the link to the host sets the pace."""
        self.pointer, self.gpu, self.shape = pointer, gpu, (num_blocks, block_bytes)
        self._lane, self.kernels = Lane(driver), kernels
        rows = max(1, STAGING_BYTES // block_bytes)
        self._staging = driver.pinned(rows * block_bytes).reshape(rows, block_bytes)
        self._lock = threading.Lock()

    def address(self, row: int) -> int:
        return self.pointer + row * self.shape[1]

    def digests(self, rows: Sequence[int]) -> tuple[bytes, ...]:
        """XXH3-128 of each, as stored. IndexError: no such block."""
        self._check(rows)
        if self.kernels is not None:
            return self.kernels.digests(self, rows)
        made: list[bytes] = []
        with self._lock:
            for part in self._parts(rows):
                self._read(part)
                made += digests(self._staging, range(len(part)))
        return tuple(made)

    def load(self, rows: Sequence[int]) -> Blocks:
        """A copy, `[len(rows), block_bytes]`."""
        self._check(rows)
        loaded = np.empty((len(rows), self.shape[1]), np.uint8)
        with self._lock:
            for first, part in zip(range(0, len(rows), len(self._staging)), self._parts(rows)):  # noqa: B905
                self._read(part)
                loaded[first : first + len(part)] = self._staging[: len(part)]
        return loaded

    def store(
        self, source: Blocks, source_rows: Sequence[int], rows: Sequence[int], digest: bool
    ) -> tuple[bytes, ...]:
        """As `verified_copy` into these blocks; the digests are of what the device was sent."""
        self._check(rows)
        here, made = int(self._staging.ctypes.data), list[bytes]()
        size = self.shape[1]
        with self._lock:
            for first, part in zip(range(0, len(rows), len(self._staging)), self._parts(rows)):  # noqa: B905
                given = source_rows[first : first + len(part)]
                made += verified_copy(source, given, self._staging, range(len(part)), digest)
                self._lane.carry_out(
                    (self.address(row), here + i * size, size) for i, row in enumerate(part)
                )
        return tuple(made)

    def _parts(self, rows: Sequence[int]) -> Iterable[Sequence[int]]:
        step = len(self._staging)
        return (rows[start : start + step] for start in range(0, len(rows), step))

    def _read(self, part: Sequence[int]) -> None:
        here, size = int(self._staging.ctypes.data), self.shape[1]
        self._lane.carry_out(
            (here + i * size, self.address(row), size) for i, row in enumerate(part)
        )

    def _check(self, rows: Sequence[int]) -> None:
        if not all(0 <= row < self.shape[0] for row in rows):
            raise IndexError(f"no such row in {self.shape[0]}: {min(rows)} .. {max(rows)}")


PoolBlocks: TypeAlias = Blocks | DeviceBlocks
"""The bytes of a pool, wherever it lies."""


class DeviceSegment(NamedTuple):
    """A pool on a GPU, in the place of a `Segment`: it has no name and goes with its process."""

    header: SegmentHeader
    blocks: DeviceBlocks
    scratch: DeviceBlocks
    """Nobody's: READs by which transports are timed land here."""
    pages: str

    def close(self) -> None:
        """Peers may have it mapped: the driver keeps it for them."""


def create_device_segment(
    header: SegmentHeader, index: int, scratch_bytes: int, kernels: Kernels | None = None
) -> DeviceSegment:
    """On GPU `index`; the blocks are zero. CudaError: there is no room, or no GPU."""
    size, few = header.block_bytes, max(1, scratch_bytes // header.block_bytes)

    def blocks(count: int) -> DeviceBlocks:
        driver = CudaDriver(index)
        return DeviceBlocks(driver, driver.reserve(count * size), count, size, index, kernels)

    return DeviceSegment(header, blocks(header.num_blocks), blocks(few), f"memory of GPU {index}")


def store(
    source: Blocks, source_rows: Sequence[int], into: PoolBlocks, rows: Sequence[int], digest: bool
) -> tuple[bytes, ...]:
    """As `verified_copy`, into any pool."""
    if isinstance(into, DeviceBlocks):
        return into.store(source, source_rows, rows, digest)
    return verified_copy(source, source_rows, into, rows, digest)


def load(blocks: PoolBlocks, rows: Sequence[int]) -> Sequence[Blocks]:
    """uint8 `[block_bytes]` of each row: the pool's own memory, or a copy where the host has none
    of it."""
    if isinstance(blocks, DeviceBlocks):
        return list(blocks.load(rows))
    return [blocks[row] for row in rows]
