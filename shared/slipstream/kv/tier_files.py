"""Blocks as files: one raw block each, its name says what it is, nothing else is written.

    {folder}/kv-{layout}/{hash}-{digest}-{position}

A file gets its name when all its bytes are in it, and what is read is held against the digest in
the name: a torn file is never seen, a flipped bit is. One process has the folder at a time.
"""

import fcntl
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from slipstream.config import SetupError, make_folder
from slipstream.core.blocks import Named
from slipstream.kv.digest import DIGEST_BYTES
from slipstream.kv.segment import Blocks

_LAYOUT = re.compile(r"kv-[0-9a-f]{16}")
_BLOCK = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-([0-9]{1,9})")
_UNFINISHED = ".part"


class TierFiles:
    """The files of one layout. Calls may come from any thread, about one block from one."""

    def __init__(self, folder: Path, kv_layout_id: str, block_bytes: int):
        """SetupError: the folder cannot be made or written, or another process has it."""
        layout = hashlib.sha256(kv_layout_id.encode()).hexdigest()[:16]
        self.root, self.folder = folder, folder / f"kv-{layout}"
        self.block_bytes = block_bytes
        make_folder("slipstream", "--offload-dir", self.folder)
        try:
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SetupError(
                f"slipstream: --offload-dir {folder}: {error.strerror}; give a folder that can be "
                "written"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise SetupError(
                f"slipstream: --offload-dir {folder}: in use by another process; give each "
                "worker its own"
            ) from None

    def close(self) -> None:
        os.close(self._lock)

    def sweep(self) -> tuple[list[tuple[Named, bytes]], int]:
        """(block, digest) of what an earlier process has left, oldest first, and how many files
        went: those of other layouts, of another size, unfinished ones. Strangers' files stay."""
        found: list[tuple[float, Named, bytes]] = []
        removed = 0
        for folder in self.root.iterdir():
            if not _LAYOUT.fullmatch(folder.name) or not folder.is_dir() or folder.is_symlink():
                continue
            for file in list(folder.iterdir()):
                match = _BLOCK.fullmatch(file.name.removesuffix(_UNFINISHED))
                if match is None:
                    continue
                about = file.stat()
                whole = file.name == match[0] and about.st_size == self.block_bytes
                if folder == self.folder and whole:
                    block = Named(bytes.fromhex(match[1]), int(match[3]))
                    found.append((about.st_mtime, block, bytes.fromhex(match[2])))
                else:
                    file.unlink(missing_ok=True)
                    removed += 1
            if folder != self.folder and not any(folder.iterdir()):
                folder.rmdir()
        return [(block, digest) for _, block, digest in sorted(found)], removed

    def write(self, block: Named, digest: bytes, data: Blocks) -> None:
        """OSError: it is not there then."""
        path = self._path(block, digest)
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            unfinished.write_bytes(data.data)
            unfinished.rename(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def read(self, block: Named, digest: bytes, into: Blocks) -> bool:
        """False unless all bytes were there; they still have to be held against the digest."""
        try:
            with self._path(block, digest).open("rb", buffering=0) as file:
                return file.readinto(into.data) == self.block_bytes
        except OSError:
            return False

    def remove(self, block: Named, digest: bytes) -> None:
        with suppress(OSError):  # a folder that went away has taken its files along
            self._path(block, digest).unlink(missing_ok=True)

    def _path(self, block: Named, digest: bytes) -> Path:
        assert len(digest) == DIGEST_BYTES
        return self.folder / f"{block.block_hash.hex()}-{digest.hex()}-{block.position}"
