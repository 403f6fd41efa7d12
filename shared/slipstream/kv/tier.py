"""The tiers below the pool: host memory, then files. What leaves one goes to the next, or is gone.

Saving copies into host memory and returns; a thread writes the coldest blocks out before their
memory is needed. Whatever changes tier is told, in order, from that thread. Nobody waits for a
disk but who loads from it.
"""

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_128_digest

from slipstream.core.blocks import Named
from slipstream.kv.segment import Blocks
from slipstream.kv.tier_files import TierFiles
from slipstream.types import BlockHash

HOST, DISK = 1, 2
_COUNTED = ("saved", "refused", "loaded_host", "loaded_disk", "missed", "dropped", "bad")
"""What is shown before it has happened once."""
STAGING_ROWS = 4
"""Least host memory if there is a disk: what is on its way there lies in it."""

_LOG = logging.getLogger(__name__)


class Moved(NamedTuple):
    """A block is now in this tier, and in no better one of these; None: in none."""

    block: Named
    tier: int | None


@dataclass(slots=True, eq=False)
class _Held:
    """One block. `row`: where it lies in host memory; None: it is a file."""

    block: Named
    digest: bytes
    row: int | None
    users: int = 0
    """Who copies from its row, or writes it out, at this moment."""
    gone: bool = False


class TierStore:
    """Blocks by hash; least recently used ones go first. Any thread may call."""

    def __init__(
        self,
        folder: Path | None,
        host_bytes: int,
        disk_bytes: int,
        block_bytes: int,
        kv_layout_id: str = "",
        tell: Callable[[Sequence[Moved]], None] = lambda moved: None,
    ):
        """`folder`: of this process alone; None, or 0 `disk_bytes`: no files. What an earlier
        process with this layout has left there is taken over, and told as moved to `DISK`.

        StartError: the folder cannot be used.
        """
        self.block_bytes, self._tell = block_bytes, tell
        self._disk_blocks = disk_bytes // block_bytes if folder is not None else 0
        rows = max(host_bytes // block_bytes, STAGING_ROWS if self._disk_blocks else 0)
        self._files: TierFiles | None = None
        if folder is not None and self._disk_blocks:
            self._files = TierFiles(folder, kv_layout_id, block_bytes)
        self._host: Blocks = np.empty((rows, block_bytes), np.uint8)
        self._free = list(range(rows))
        self._reserve = min(max(1, rows // 8), 64) if self._disk_blocks else 0
        """Rows that the thread keeps free."""
        self._in_host: OrderedDict[BlockHash, _Held] = OrderedDict()
        self._on_disk: OrderedDict[BlockHash, _Held] = OrderedDict()
        self._moved: deque[Moved] = deque()
        self._litter: deque[_Held] = deque()
        """Files to be removed."""
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
        self._closed = False
        self._wake = threading.Condition()
        if self._files is not None:
            with self._wake:
                self._take_over(self._files)
        self._thread = threading.Thread(target=self._run, name="kv-tier", daemon=True)
        self._thread.start()

    def save(
        self, block: Named, data: Blocks, digest: bytes | None = None, timeout_s: float = 0.0
    ) -> bool:
        """Copy uint8 `[block_bytes]`, which may change when this returns. True: it is there.

        False: no memory came free in time, for the disk is slower than what comes in. `digest`:
        XXH3-128 of `data`, if known.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._has_room(block), max(0.0, timeout_s))
            if self._find(block.block_hash) is not None:
                return True
            row = self._take_row()
            if row is None:
                self._counts["refused"] += 1
                return False
        try:
            self._host[row] = data
            held = _Held(block, digest or xxh3_128_digest(self._host[row].data), row)
        except BaseException:
            with self._wake:
                self._free.append(row)
            raise
        with self._wake:
            if self._closed or self._find(block.block_hash) is not None:
                self._free.append(row)
                return not self._closed
            self._in_host[block.block_hash] = held
            self._counts["saved"] += 1
            self._moved.append(Moved(block, HOST))
            self._wake.notify_all()
        return True

    def load(self, block_hash: BlockHash, into: Blocks) -> bytes | None:
        """Copy the block into uint8 `[block_bytes]` and return its digest, which `into` has.

        None: it is not there, or not what it was; `into` may hold anything then.
        """
        with self._wake:
            held = self._find(block_hash)
            if held is None:
                self._counts["missed"] += 1
                return None
            held.users += 1
            row = held.row  # it may become a file while we copy; the row stays until we are done
        whole = False
        try:
            whole = self._copy(held, row, into)
        finally:
            with self._wake:
                self._leave(held, row)
        with self._wake:
            if whole:
                self._counts["loaded_host" if row is not None else "loaded_disk"] += 1
                return held.digest
            if not held.gone:
                self._counts["bad"] += 1
                self._drop(held)
            return None

    def _copy(self, held: _Held, row: int | None, into: Blocks) -> bool:
        """Whether `into` has the block now."""
        if row is not None:
            into[:] = self._host[row]
        else:
            assert self._files is not None
            if not self._files.read(held.block, held.digest, into):
                return False
        return xxh3_128_digest(into.data) == held.digest

    def discard(self, hashes: Iterable[BlockHash]) -> None:
        """Forget these, wherever they are."""
        with self._wake:
            for block_hash in hashes:
                held = self._find(block_hash)
                if held is not None:
                    self._drop(held)

    def tier_of(self, block_hash: BlockHash) -> int | None:
        with self._wake:
            if block_hash in self._in_host:
                return HOST
            return DISK if block_hash in self._on_disk else None

    def statistics(self) -> dict[str, float]:
        """Blocks and bytes in each tier, and since the start: blocks saved, refused, loaded from
        each tier, missed, dropped for room, bad (not what they were), failed writes."""
        with self._wake:
            counts = {f"tier_{name}_total": float(n) for name, n in self._counts.items()}
            blocks = {"host": len(self._in_host), "disk": len(self._on_disk)}
        for tier, count in blocks.items():
            counts[f"tier_{tier}_blocks"] = float(count)
            counts[f"tier_{tier}_bytes"] = float(count * self.block_bytes)
        return counts

    def close(self) -> None:
        """What is in files stays for the next process; what is in memory goes with this one."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()
        if self._files is not None:
            self._files.close()

    # --- Under the lock ---------------------------------------------------------------------------

    def _find(self, block_hash: BlockHash) -> _Held | None:
        """And it is the one used last."""
        for tier in (self._in_host, self._on_disk):
            if block_hash in tier:
                tier.move_to_end(block_hash)
                return tier[block_hash]
        return None

    def _has_room(self, block: Named) -> bool:
        """Or needs none, or there will never be any."""
        known = block.block_hash in self._in_host or block.block_hash in self._on_disk
        return bool(known or self._free or self._closed or self._victim())

    def _victim(self) -> _Held | None:
        """Without a disk the coldest block makes room at once."""
        if self._disk_blocks:
            return None
        return next((held for held in self._in_host.values() if not held.users), None)

    def _take_row(self) -> int | None:
        victim = None if self._free else self._victim()
        if victim is not None:
            self._counts["dropped"] += 1
            self._drop(victim)
        return self._free.pop() if self._free else None

    def _drop(self, held: _Held) -> None:
        held.gone = True
        if self._in_host.pop(held.block.block_hash, None) is None:
            del self._on_disk[held.block.block_hash]
            self._litter.append(held)
        self._free_row(held)
        self._moved.append(Moved(held.block, None))
        self._wake.notify_all()

    def _leave(self, held: _Held, row: int | None) -> None:
        """One user less of what lay in this row."""
        held.users -= 1
        if row is not None:
            self._free_row(held)
        self._wake.notify_all()

    def _free_row(self, held: _Held) -> None:
        """Once nobody reads from it, and it is gone or a file."""
        elsewhere = held.gone or held.block.block_hash in self._on_disk
        if elsewhere and not held.users and held.row is not None:
            self._free.append(held.row)
            held.row = None
            self._wake.notify_all()

    def _coldest(self) -> _Held | None:
        """What is to be written out next, if memory is short."""
        if self._files is None or len(self._free) >= self._reserve:
            return None
        return next((held for held in self._in_host.values() if not held.users), None)

    def _take_over(self, files: TierFiles) -> None:
        found, self._counts["swept"] = files.sweep()
        for block, digest in found:
            earlier = self._on_disk.pop(block.block_hash, None)
            if earlier is not None:
                self._litter.append(earlier)
            self._on_disk[block.block_hash] = _Held(block, digest, None)
        self._moved.extend(Moved(held.block, DISK) for held in self._on_disk.values())
        self._make_room()

    def _make_room(self) -> None:
        while len(self._on_disk) > self._disk_blocks:
            self._counts["dropped"] += 1
            self._drop(next(iter(self._on_disk.values())))

    # --- The thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closed or self._moved or self._litter or self._coldest()
                )
                moved, self._moved = list(self._moved), deque()
                litter, self._litter = list(self._litter), deque()
                if self._closed and not (moved or litter):
                    return
                victim = None if self._closed else self._coldest()
                if victim is not None:
                    victim.users += 1
            try:
                if moved:
                    self._tell(moved)
            except Exception:  # noqa: BLE001 who listens does not decide whether blocks are kept
                _LOG.exception("KV tier: where %d blocks are could not be told", len(moved))
            for held in litter:
                assert self._files is not None
                self._files.remove(held.block, held.digest)
            if victim is not None:
                self._write_out(victim)

    def _write_out(self, held: _Held) -> None:
        assert self._files is not None and held.row is not None
        written = True
        try:
            self._files.write(held.block, held.digest, self._host[held.row])
        except Exception as error:  # noqa: BLE001 without this thread no block leaves host memory
            written = False
            if not self._counts["write_failures"]:
                _LOG.warning("KV tier: %s: %s; blocks are dropped instead", self._files.root, error)
        with self._wake:
            held.users -= 1
            if held.gone:  # meanwhile
                if written:
                    self._litter.append(held)
                self._free_row(held)
            elif written:
                del self._in_host[held.block.block_hash]
                self._on_disk[held.block.block_hash] = held
                self._free_row(held)
                self._moved.append(Moved(held.block, DISK))
                self._make_room()
            else:
                self._counts["write_failures"] += 1
                self._drop(held)
