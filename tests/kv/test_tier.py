"""What went to a lower tier comes back as it was, or not at all; and everything that moves is
told."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
from xxhash import xxh3_128_digest

from slipstream.config import StartError
from slipstream.core.blocks import Named
from slipstream.kv.segment import Blocks
from slipstream.kv.tier import DISK, HOST, Moved, TierStore
from slipstream.kv.tier_files import TierFiles

BLOCK_BYTES = 512
LAYOUT = "toy/float32/l1"
WAIT_S = 30.0


def named(number: int) -> Named:
    return Named(number.to_bytes(16, "big"), number)


def content(number: int) -> Blocks:
    return np.random.default_rng(number).integers(0, 256, BLOCK_BYTES, np.uint8)


class Tier:
    """A store, and a listener that knows where everything is from what it is told."""

    def __init__(self, folder: Path | None, host: int, disk: int) -> None:
        self.told: list[Moved] = []
        self.places: dict[bytes, int] = {}
        self._changed = threading.Condition()
        self.store = TierStore(
            *(folder, host * BLOCK_BYTES, disk * BLOCK_BYTES, BLOCK_BYTES, LAYOUT), self._listen
        )

    def _listen(self, moved: Sequence[Moved]) -> None:
        with self._changed:
            self.told += moved
            for block, tier in moved:
                if tier is None:
                    self.places.pop(block.block_hash, None)
                else:
                    self.places[block.block_hash] = tier
            self._changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S), (self.places, self.statistics)

    def save(self, *numbers: int) -> None:
        """One after another, each as soon as there is memory for it."""
        for number in numbers:
            while not self.store.save(named(number), content(number)):
                threading.Event().wait(0.001)

    def load(self, number: int) -> bool:
        """Whether it is there; if so, it is right."""
        into = np.zeros(BLOCK_BYTES, np.uint8)
        digest = self.store.load(named(number).block_hash, into)
        if digest is None:
            return False
        assert (into == content(number)).all()
        assert digest == xxh3_128_digest(content(number).data)
        return True

    def where(self, *numbers: int) -> list[int | None]:
        return [self.store.tier_of(named(number).block_hash) for number in numbers]

    @property
    def statistics(self) -> dict[str, float]:
        return self.store.statistics()


@contextmanager
def tier(folder: Path | None = None, host: int = 4, disk: int = 0) -> Iterator[Tier]:
    made = Tier(folder, host, disk)
    try:
        yield made
    finally:
        made.store.close()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("kv-*/*") if path.is_file())


def test_host_memory_alone_drops_what_is_coldest() -> None:
    with tier(host=3) as it:
        it.save(1, 2, 3)
        assert it.load(1)
        it.save(4, 1, 5)
        assert it.where(1, 2, 3, 4, 5) == [HOST, None, None, HOST, HOST]
        assert not it.load(2) and it.load(5)
        it.store.discard([named(4).block_hash, named(9).block_hash])
        it.until(lambda: set(it.places) == {named(n).block_hash for n in (1, 5)})
        assert it.told[-1] == Moved(named(4), None)
        assert it.statistics["tier_dropped_total"] == 2
        assert it.statistics["tier_host_blocks"] == 2


def test_what_has_no_room_in_memory_becomes_a_file_and_then_nothing(tmp_path: Path) -> None:
    with tier(tmp_path, host=8, disk=10) as it:
        it.save(*range(30))
        it.until(lambda: _agrees(it) and it.where(13, 22, 23) == [DISK, DISK, HOST])
        assert it.where(*range(13)) == [None] * 13
        assert it.where(*range(13, 30)) == [DISK] * 10 + [HOST] * 7
        assert all(it.load(number) for number in range(13, 30))
        assert not any(it.load(number) for number in range(13))
        it.store.discard([named(13).block_hash])
        it.until(lambda: named(13).block_hash not in it.places)
    assert len(files(tmp_path)) == 9, "files of what is gone are gone"
    assert all(path.stat().st_size == BLOCK_BYTES for path in files(tmp_path))


def test_files_outlive_the_process_others_are_swept(tmp_path: Path) -> None:
    with tier(tmp_path, host=4, disk=20) as it:
        it.save(*range(10))
        it.until(lambda: list(it.places.values()).count(DISK) == 7)
    (good, *_, torn, unfinished) = files(tmp_path)
    torn.write_bytes(b"short")
    unfinished.rename(unfinished.with_name(unfinished.name + ".part"))
    strangers = [tmp_path / "notes.txt", good.with_name("notes.txt"), tmp_path / "kv-other"]
    for stranger in strangers:
        stranger.write_text("not ours")
    other = tmp_path / ("kv-" + "0" * 16)
    other.mkdir()
    (other / good.name).write_bytes(good.read_bytes())
    with tier(tmp_path, host=4, disk=20) as it:
        it.until(lambda: list(it.places.values()) == [DISK] * 5)
        assert sum(it.load(number) for number in range(10)) == 5
        assert it.statistics["tier_swept_total"] == 3
        assert not other.exists() and all(stranger.exists() for stranger in strangers)
    with tier(tmp_path, host=4, disk=3) as it:
        it.until(lambda: len(it.places) == 3)
        it.save(20)
    assert len(files(tmp_path)) == 3 + 1, "three blocks, and the stranger's file"


def test_a_flipped_bit_is_found_and_the_file_goes(tmp_path: Path) -> None:
    with tier(tmp_path, host=4, disk=20) as it:
        it.save(*range(6))
        it.until(lambda: list(it.places.values()).count(DISK) == 3)
        bad = files(tmp_path)[0]
        data = bytearray(bad.read_bytes())
        data[17] ^= 1
        bad.write_bytes(data)
        assert [it.load(number) for number in range(6)] == [False] + [True] * 5
        assert it.statistics["tier_bad_total"] == 1
        it.until(lambda: named(0).block_hash not in it.places)
        files(tmp_path)[0].unlink()
        assert not it.load(1), "somebody has tidied up"
        assert it.statistics["tier_bad_total"] == 2
    assert bad not in files(tmp_path)


def test_a_full_disk_drops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = threading.Event()
    write = TierFiles.write

    def refuse(self: TierFiles, *arguments: object) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TierFiles, "write", refuse)
    with tier(tmp_path, host=4, disk=20) as it:
        full.set()
        it.save(*range(6))
        it.until(lambda: it.statistics.get("tier_write_failures_total") == 3 and _agrees(it))
        assert len(it.places) == 3
        full.clear()
        it.save(*range(6, 10))
        it.until(lambda: list(it.places.values()).count(DISK) == 4)


def test_a_slow_disk_refuses_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = TierFiles.write

    def wait(self: TierFiles, *arguments: object) -> None:
        assert go_on.wait(WAIT_S)
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TierFiles, "write", wait)
    with tier(tmp_path, host=4, disk=20) as it:
        saved = [it.store.save(named(number), content(number)) for number in range(10)]
        assert saved == [True] * 4 + [False] * 6
        assert it.statistics["tier_refused_total"] == 6
        assert all(it.load(number) for number in range(4)), "while it is written out too"
        it.store.discard([named(number).block_hash for number in range(4)])
        assert not it.load(0)
        go_on.set()
        it.save(*range(20, 24))
        it.until(lambda: named(20).block_hash in it.places)
        it.until(lambda: not {named(n).block_hash for n in range(4)} & set(it.places))
    assert len(files(tmp_path)) <= 4


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from slipstream.kv.tier import TierStore\n"
        f"store = TierStore(Path({str(tmp_path)!r}), 512, 5120, 512, {LAYOUT!r})\n"
        "print('there', flush=True); sys.stdin.read(); store.close()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None and other.stdout.readline() == b"there\n"
    with pytest.raises(StartError, match="in use by another process; give each worker its own"):
        Tier(tmp_path, 4, 10)
    other.communicate()
    with tier(tmp_path, 4, 10):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="give a folder that can be written"):
        Tier(tmp_path / "file", 4, 10)


@pytest.mark.parametrize("seed", range(20))
def test_drawn_operations(tmp_path: Path, seed: int) -> None:
    """Against a model: what the listener knows is where things are; every load is right."""
    draw = Random(seed)
    host, disk = draw.choice([(4, 0), (8, 6), (5, 40), (0, 10)])
    for _ in range(3):  # lives of one folder
        with tier(tmp_path, host, disk) as it:
            for _ in range(150):
                number, kind = draw.randrange(30), draw.random()
                if kind < 0.5:
                    it.store.save(named(number), content(number))
                elif kind < 0.9:
                    was_there = it.where(number) != [None]
                    if it.load(number):
                        assert was_there
                else:
                    it.store.discard([named(number).block_hash])
                    assert it.where(number) == [None]
            it.until(lambda it=it: _agrees(it))
            sizes = it.statistics["tier_host_blocks"], it.statistics["tier_disk_blocks"]
            assert sizes[0] <= max(host, 4) and sizes[1] <= disk
            assert it.statistics.get("tier_bad_total", 0) == 0
        on_disk = {path.name[:32] for path in files(tmp_path)}
        assert on_disk == {h.hex() for h, place in it.places.items() if place == DISK}


def _agrees(it: Tier) -> bool:
    places = {named(n).block_hash: place for n in range(30) if (place := it.where(n)[0])}
    return it.places == places


@pytest.mark.parametrize("disk", [0, 12])
def test_many_threads_at_once(tmp_path: Path, disk: int) -> None:
    failed: list[BaseException] = []
    with tier(tmp_path, 8, disk) as it:

        def work(seed: int) -> None:
            draw = Random(seed)
            try:
                for _ in range(400):
                    number = draw.randrange(24)
                    if draw.random() < 0.45:
                        it.store.save(named(number), content(number))
                    elif draw.random() < 0.9:
                        it.load(number)
                    else:
                        it.store.discard([named(number).block_hash])
            except BaseException as error:  # noqa: BLE001 told by the main thread
                failed.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        it.until(lambda: _agrees(it))
        it.store.discard([named(number).block_hash for number in range(24)])
        it.until(lambda: not it.places)
        assert it.statistics.get("tier_bad_total", 0) == 0
        if not disk:
            it.save(*range(100, 108))
            assert it.where(*range(100, 108)) == [HOST] * 8, "no row was lost"
    assert files(tmp_path) == []


def test_an_error_in_a_copy_costs_no_row() -> None:
    tier = Tier(None, host=1, disk=0)
    wrong = np.zeros(BLOCK_BYTES + 1, np.uint8)
    with pytest.raises(ValueError):
        tier.store.save(named(1), wrong)
    tier.save(1)
    with pytest.raises(ValueError):
        tier.store.load(named(1).block_hash, wrong)
    assert tier.store.save(named(2), content(2)), "the row of what is not used any more"
    assert not tier.load(1) and tier.load(2)
    tier.store.close()
