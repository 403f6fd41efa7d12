"""Memory that begins where a huge page can, in huge pages where the kernel has them.

UCX reads a peer's memory page by page: from pages of 4 KiB at half the speed or less. A file of a
tmpfs that is mounted without `huge=` gets huge pages by MADV_COLLAPSE alone, from Linux 6.1 on.
"""

import contextlib
import ctypes
import mmap
import os

import numpy as np
from numpy.typing import NDArray

HUGE_BYTES = 2 << 20
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)


class Mapping:
    """Adjacent bytes at a multiple of HUGE_BYTES; unmapped with the last view of `bytes`."""

    def __init__(self, size: int, file: int = -1, writable: bool = True):
        """The first `size` bytes of the file, shared; private zeroes without one. OSError."""
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        # Python's own object gives back the whole range, with whatever is mapped into it.
        self._range = mmap.mmap(-1, size + HUGE_BYTES, flags, prot)
        whole: NDArray[np.uint8] = np.frombuffer(self._range, np.uint8)
        self._start = -whole.ctypes.data % HUGE_BYTES
        self.bytes = whole[self._start : self._start + size]
        """uint8 `[size]`, read-only unless `writable`."""
        if file >= 0:
            address = self.bytes.ctypes.data
            shared = mmap.MAP_SHARED | _MAP_FIXED
            if _LIBC.mmap(address, size, prot, shared, file, 0) != address:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with contextlib.suppress(OSError):
            self._range.madvise(mmap.MADV_HUGEPAGE, self._start, size)

    def collapse(self) -> None:
        """Takes all whole huge pages of a file, at once; needs a page in each (`seed`).

        OSError: the kernel has none, or not enough; what it gave stays, and the rest are small.
        """
        whole = self.bytes.size // HUGE_BYTES * HUGE_BYTES
        if whole:
            self._range.madvise(_MADV_COLLAPSE, self._start, whole)

    def populate(self) -> None:
        """Maps all pages now, as far as the kernel can (Linux 5.14)."""
        with contextlib.suppress(OSError):
            self._range.madvise(_MADV_POPULATE_WRITE, self._start, self.bytes.size)


def seed(file: int, size: int) -> None:
    """One small page wherever the file may have a huge one: the kernel collapses no hole."""
    for start in range(0, size, HUGE_BYTES):
        os.posix_fallocate(file, start, 1)
