"""The pool of a CPU worker: a named shared-memory file that peers on the host map read-only.

`{shm_dir}/slipstream-{run}-{node_id}-{epoch}`: one page of header, then the blocks. Its owner holds
a lock (flock) on it while it lives, so a file without a lock belongs to a dead process.
"""

import errno
import fcntl
import os
import re
import struct
import time
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.config import SetupError, StartError, format_bytes
from slipstream.errors import ExitCode
from slipstream.kv.huge_pages import HUGE_BYTES, Mapping, seed

MAGIC = b"SLIPKV01"
HEADER_BYTES = 4096
YOUNG_S = 60.0
_LENGTH = struct.Struct("<I")

Blocks: TypeAlias = NDArray[np.uint8]
"""uint8 `[num_blocks, block_bytes]`, contiguous: the bytes of a pool, one row a block."""


class SegmentError(Exception):
    """This file is not the segment that was meant; one line."""


class SegmentHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a segment says about itself. Peers map it only if every word is what they expect."""

    kv_layout_id: str
    epoch: int
    num_blocks: int
    block_bytes: int

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.num_blocks * self.block_bytes


class Segment:
    """A mapped segment. `blocks` stays usable after `close` for as long as somebody holds it."""

    def __init__(self, path: Path, file: int, header: SegmentHeader, blocks: Blocks, pages: str):
        self.path, self.header, self.blocks = path, header, blocks
        self.pages = pages
        """For the log: what kind of pages the kernel gave, and why not huge ones."""
        self._file = file

    def close(self) -> None:
        """Owner's end: the name goes at once, the memory with the last mapping. Idempotent."""
        if self._file >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def segment_path(shm_dir: str, run_dir: str, node_id: str, epoch: int) -> Path:
    return Path(shm_dir) / f"slipstream-{Path(run_dir).name}-{node_id}-{epoch}"


def create_segment(path: Path, header: SegmentHeader) -> Segment:
    """Makes and locks the file; the blocks are zero.

    StartError: no room for it, or the folder cannot be written. All memory is taken here, because
    a full folder would otherwise show as SIGBUS in the middle of a request.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SetupError(f"slipstream: --shm-dir: {path}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        memory, pages = _take(file, header.file_bytes, path.parent)
        encoded = msgspec.msgpack.encode(header)
        os.pwrite(file, MAGIC + _LENGTH.pack(len(encoded)) + encoded, 0)
    except OSError as error:
        path.unlink(missing_ok=True)
        os.close(file)
        raise StartError(
            f"slipstream: no room for the KV pool in {path.parent}: needs "
            f"{format_bytes(header.file_bytes)}, {format_bytes(free_bytes(path.parent))} available "
            f"({error.strerror}); lower --kv-cache-bytes or give another --shm-dir",
            ExitCode.MEMORY,
        ) from None
    return Segment(path, file, header, _blocks(memory, header), pages)


def attach_segment(path: Path, expected: SegmentHeader) -> Blocks:
    """A peer's blocks, read-only. SegmentError: no such file, or not the one that was expected."""
    try:  # without waiting for who would write into a pipe of that name
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise SegmentError(f"{str(path)!r}: {error}") from None
    try:
        found = _read_header(path, file)
        if found != expected:
            raise SegmentError(f"{path}: holds {found}, expected {expected}")
        size = os.fstat(file).st_size
        if size != expected.file_bytes:
            raise SegmentError(f"{path}: {size} bytes long, expected {expected.file_bytes}")
        memory = Mapping(size, file, writable=False)
    except OSError as error:
        raise SegmentError(f"{path}: {error.strerror}") from None
    finally:
        os.close(file)
    return _blocks(memory, expected)


def remove_dead_segments(shm_dir: str, run_dir: str, node_id: str) -> list[Path]:
    """Unlinks what dead processes of this run left behind, containers for instance that nobody
    starts again; returns what it removed. Who has just begun may not have its lock yet, unless it
    was of this node id, which is ours."""
    run, ours = (segment_path("", run_dir, name, 0).name[:-2] for name in ("", node_id))
    removed = []
    for path in sorted(Path(shm_dir).glob("slipstream-*")):
        own = re.fullmatch(re.escape(ours) + r"-\d+", path.name)
        others = path.name.startswith(run) and _is_older(path, YOUNG_S)
        if (own or others) and _is_dead(path):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_older(path: Path, age_s: float) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > age_s
    except OSError:
        return False


def free_bytes(folder: str | Path) -> int:
    """Bytes that this user can still write into the folder's file system."""
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize


def _take(file: int, size: int, folder: Path) -> tuple[Mapping, str]:
    """All memory of the file, and in which pages: huge ones where the kernel gives them.

    OSError: it is not there.

    In this order: pages that are there before their huge page cost a copy each, which takes ten
    times as long. Small ones are mapped now as well, not at the first write of each: a READ into
    fresh ones is many times slower.
    """
    if size > free_bytes(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(file, size)
    seed(file, size)
    memory = Mapping(size, file)
    pages = "huge pages" if size >= HUGE_BYTES else "small pages"
    try:
        memory.collapse()
    except OSError as error:
        pages = f"pages as {folder} has them, not collapsed to huge ones ({error.strerror})"
    os.posix_fallocate(file, 0, size)
    memory.populate()
    return memory, pages


def _blocks(memory: Mapping, header: SegmentHeader) -> Blocks:
    return memory.bytes[HEADER_BYTES:].reshape(header.num_blocks, header.block_bytes)


def _read_header(path: Path, file: int) -> SegmentHeader:
    page = os.pread(file, HEADER_BYTES, 0)
    start = len(MAGIC) + _LENGTH.size
    if len(page) < HEADER_BYTES or not page.startswith(MAGIC):
        raise SegmentError(f"{path}: not a segment")
    (length,) = _LENGTH.unpack_from(page, len(MAGIC))
    try:
        return msgspec.msgpack.decode(page[start : start + length], type=SegmentHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SegmentError(f"{path}: malformed header: {error}") from None


def _is_dead(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
