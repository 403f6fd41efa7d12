"""Between a pool and the tiers below it, with real memory, files and threads."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slipstream.core import machine as m
from slipstream.engine import offload
from slipstream.engine.offload import Offload
from slipstream.kv.digest import block_digests
from slipstream.kv.tier import HOST
from slipstream.kv.tier_files import TierFiles

ROWS, BLOCK_BYTES = 24, 4096
WAIT_S = 30.0


class Rig:
    def __init__(self, folder: Path | None, host_blocks: int, disk_blocks: int = 0):
        self.pool = np.random.default_rng(1).integers(0, 256, (ROWS, BLOCK_BYTES), np.uint8)
        self.before = self.pool.copy()
        self.events: queue.Queue[m.Event] = queue.Queue()
        self.offload = Offload(
            self.pool,
            "layout",
            folder=folder,
            host_bytes=host_blocks * BLOCK_BYTES,
            disk_bytes=disk_blocks * BLOCK_BYTES,
        )
        self.where: dict[bytes, int | None] = {}
        self.offload.start(self.events.put)

    def save(self, rows: range) -> None:
        saved = tuple(m.SavedBlock(row, name(row), row, None) for row in rows)
        self.offload.execute(m.SaveBlocks("op", saved))
        assert self.until(m.BlocksSaved) == m.BlocksSaved("op")

    def load(self, names: range, into: range) -> m.PullDone:
        self.offload.execute(m.LoadBlocks("pull", tuple(name(row) for row in names), tuple(into)))
        done = self.until(m.PullDone)
        assert isinstance(done, m.PullDone)
        return done

    def until(self, kind: type[m.Event]) -> m.Event:
        """The next event of a kind; what moved meanwhile is noted."""
        while True:
            event = self.events.get(timeout=WAIT_S)
            if isinstance(event, m.BlocksMoved):
                self.where |= {move.block_hash: move.tier for move in event.moved}
            if isinstance(event, kind):
                return event

    def until_moved(self, count: int, tier: int | None) -> None:
        while sum(where == tier for where in self.where.values()) < count:
            self.until(m.BlocksMoved)


def name(row: int) -> bytes:
    return row.to_bytes(16, "big")


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.offload.close()


def test_what_was_saved_comes_back_elsewhere(rigs: list[Rig]) -> None:
    rig = Rig(None, host_blocks=8)
    rigs.append(rig)
    rig.save(range(4))
    rig.pool[:4] = 0
    done = rig.load(range(4), into=range(10, 14))
    assert (rig.pool[10:14] == rig.before[:4]).all()
    assert done.digests == block_digests(rig.before, range(4)) and done.transport == "tier"
    assert rig.load(range(2, 9), range(10, 17)).digests == done.digests[2:], "the leading ones"
    assert rig.load(range(8, 9), range(1)).digests == ()


def test_more_than_memory_holds_goes_to_files_and_outlives_the_process(
    rigs: list[Rig], tmp_path: Path
) -> None:
    rig = Rig(tmp_path, host_blocks=4, disk_blocks=100)
    rig.save(range(20))
    rig.until_moved(15, tier=2)
    assert rig.load(range(20), range(20)).digests == block_digests(rig.before, range(20))
    rig.offload.close()
    again = Rig(tmp_path, host_blocks=4, disk_blocks=100)
    rigs.append(again)
    again.until_moved(15, tier=2)
    row = next(int.from_bytes(block) for block, tier in again.where.items() if tier == 2)
    again.pool[:] = 0
    again.load(range(row, row + 1), range(1))
    assert (again.pool[0] == rig.before[row]).all()


def test_a_flipped_byte_on_disk_is_not_loaded(rigs: list[Rig], tmp_path: Path) -> None:
    rig = Rig(tmp_path, host_blocks=4, disk_blocks=100)
    rigs.append(rig)
    rig.save(range(12))
    rig.until_moved(8, tier=2)
    row = next(int.from_bytes(block) for block, tier in rig.where.items() if tier == 2)
    (file,) = tmp_path.rglob(f"{name(row).hex()}-*")
    data = bytearray(file.read_bytes())
    data[77] ^= 1
    file.write_bytes(data)
    assert rig.load(range(row, row + 1), range(1)).digests == ()
    rig.until_moved(1, tier=None)
    assert rig.where[name(row)] is None


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """It writes nothing until the event is set."""
    go_on, write = threading.Event(), TierFiles.write

    def wait(self: TierFiles, *arguments: object) -> None:
        assert go_on.wait(WAIT_S)
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TierFiles, "write", wait)
    yield go_on
    go_on.set()


def test_a_load_waits_for_no_save(
    rigs: list[Rig], tmp_path: Path, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SAVE_TIMEOUT_S", WAIT_S)
    rig = Rig(tmp_path, host_blocks=4, disk_blocks=100)
    rigs.append(rig)
    rig.save(range(4))
    saved = tuple(m.SavedBlock(row, name(row), row, None) for row in range(4, 8))
    rig.offload.execute(m.SaveBlocks("late", saved))
    assert rig.load(range(4), into=range(10, 14)).digests == block_digests(rig.before, range(4))
    slow_disk.set()
    assert rig.until(m.BlocksSaved) == m.BlocksSaved("late")
    assert rig.load(range(4, 8), range(4)).digests == block_digests(rig.before, range(4, 8))
    assert not rig.offload.store.statistics()["tier_refused_total"], "it has waited, not asked"


def test_a_refusal_is_counted_once(
    rigs: list[Rig], tmp_path: Path, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SAVE_TIMEOUT_S", 0.1)
    rig = Rig(tmp_path, host_blocks=4, disk_blocks=100)
    rigs.append(rig)
    rig.save(range(7))
    assert rig.offload.store.statistics()["tier_refused_total"] == 1
    slow_disk.set()


def test_closing_waits_for_no_room(
    tmp_path: Path, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SAVE_TIMEOUT_S", 10 * WAIT_S)
    rig = Rig(tmp_path, host_blocks=4, disk_blocks=100)
    saved = tuple(m.SavedBlock(row, name(row), row, None) for row in range(8))
    rig.offload.execute(m.SaveBlocks("op", saved))
    rig.until_moved(1, tier=HOST)  # it has begun; what has not is given up
    closing = threading.Thread(target=rig.offload.close)
    closing.start()
    assert rig.until(m.BlocksSaved) == m.BlocksSaved("op")
    slow_disk.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()


def test_a_listener_or_a_disk_that_breaks_does_not_end_the_store(
    rigs: list[Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, host_blocks=4, disk_blocks=100)
    rigs.append(rig)
    errors, write = [RuntimeError("nobody foresaw this")] * 2, TierFiles.write

    def break_down(*arguments: object) -> None:
        if errors:
            raise errors.pop()
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TierFiles, "write", break_down)
    rig.offload.start(lambda event: [][0])  # nobody can be told
    rig.offload.execute(m.SaveBlocks("op", (m.SavedBlock(0, name(0), 0, None),)))
    while not rig.offload.store.tier_of(name(0)):
        threading.Event().wait(0.001)
    rig.offload.start(rig.events.put)
    rig.save(range(1, 12))
    rig.until_moved(5, tier=2)
    assert rig.offload.store.statistics()["tier_write_failures_total"] == 2


def test_a_failure_ends_as_an_event(rigs: list[Rig]) -> None:
    rig = Rig(None, host_blocks=8)
    rigs.append(rig)
    rig.offload.execute(m.SaveBlocks("op", (m.SavedBlock(ROWS + 5, name(1), 0, None),)))
    assert rig.until(m.BlocksSaved) == m.BlocksSaved("op")
    rig.save(range(1))
    rig.offload.execute(m.LoadBlocks("pull", (name(0),), (ROWS + 5,)))
    done = rig.until(m.PullDone)
    assert isinstance(done, m.PullDone) and done.digests == ()
