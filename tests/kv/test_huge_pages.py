"""Pools in huge pages, or in small ones: the same bytes, and what is said of the pages is so."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kv.conftest import header
from slipstream.config import StartError
from slipstream.kv import segment as module
from slipstream.kv.huge_pages import HUGE_BYTES, Mapping
from slipstream.kv.segment import HEADER_BYTES, attach_segment, create_segment

BLOCK_BYTES = 4096
IN_A_HUGE_PAGE = HUGE_BYTES // BLOCK_BYTES


@pytest.fixture(params=["/dev/shm", "a disk, or whatever tests write to"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param != "/dev/shm":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def refuse(_: Mapping) -> None:
    raise OSError(22, "Invalid argument")


def huge_bytes(path: Path) -> int:
    """Bytes of the file that this process maps by huge pages, of all its mappings."""
    found = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(path) in mapping:
            kib = re.findall(r"(?:ShmemPmdMapped|FilePmdMapped): *(\d+) kB", mapping)
            found += sum(map(int, kib)) << 10
    return found


# The header is a block long: these pools end just before, at and just after a huge page.
@pytest.mark.parametrize("num_blocks", [1, *(2 * IN_A_HUGE_PAGE + n for n in (-2, -1, 0)), 1800])
@pytest.mark.parametrize("refused", [False, True])
def test_a_pool_is_aligned_zero_taken_whole_and_read_by_peers(
    folder: Path, num_blocks: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        monkeypatch.setattr(Mapping, "collapse", refuse)
        monkeypatch.setattr(Mapping, "populate", lambda _: None)  # as before Linux 5.14
    words = header(num_blocks, BLOCK_BYTES)
    segment = create_segment(folder / "pool", words)
    try:
        theirs = attach_segment(segment.path, words)
        for blocks in (segment.blocks, theirs):
            assert (blocks.ctypes.data - HEADER_BYTES) % HUGE_BYTES == 0
            assert blocks.shape == (num_blocks, BLOCK_BYTES)
            assert not blocks.any()
        assert segment.path.stat().st_size == words.file_bytes
        assert segment.path.stat().st_blocks * 512 >= words.file_bytes
        drawn = np.random.default_rng(num_blocks).integers(0, 256, theirs.shape, np.uint8)
        segment.blocks[:] = drawn
        assert (theirs == drawn).all()
        assert segment.path.read_bytes()[HEADER_BYTES:] == drawn.tobytes()
    finally:
        segment.close()


@pytest.mark.parametrize("num_blocks", [IN_A_HUGE_PAGE - 2, 3 * IN_A_HUGE_PAGE])
@pytest.mark.parametrize("refused", [False, True])
def test_it_says_which_pages_the_kernel_gave(
    folder: Path, num_blocks: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        monkeypatch.setattr(Mapping, "collapse", refuse)
    words = header(num_blocks, BLOCK_BYTES)
    segment = create_segment(folder / "pool", words)
    try:
        whole = words.file_bytes // HUGE_BYTES * HUGE_BYTES
        if refused:
            assert segment.pages.endswith("not collapsed to huge ones (Invalid argument)")
        elif segment.pages == "huge pages":
            assert huge_bytes(segment.path) == whole > 0
        elif segment.pages == "small pages":
            assert huge_bytes(segment.path) == whole == 0
        else:
            assert re.search(r"not collapsed to huge ones \(.+\)$", segment.pages)
    finally:
        segment.close()


def test_a_pool_is_unmapped_with_its_last_view(folder: Path) -> None:
    segment = create_segment(folder / "pool", header(2 * IN_A_HUGE_PAGE, BLOCK_BYTES))
    view = segment.blocks[3:]
    segment.close()
    del segment
    view[0] = 7
    assert str(folder) in Path("/proc/self/maps").read_text()
    del view
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_pool_larger_than_its_folder_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []
    monkeypatch.setattr(module, "free_bytes", lambda _: 1 << 20)
    monkeypatch.setattr(os, "posix_fallocate", lambda *what: taken.append(what))
    with pytest.raises(StartError, match=r"needs 1.0MiB, 1MiB available \(No space left"):
        create_segment(tmp_path / "pool", header(256, BLOCK_BYTES))
    assert not taken
    assert not list(tmp_path.iterdir())


def test_private_memory_is_zero_aligned_and_writable() -> None:
    flat = Mapping(HUGE_BYTES + 5).bytes
    assert flat.ctypes.data % HUGE_BYTES == 0
    assert flat.shape == (HUGE_BYTES + 5,)
    assert not flat.any()
    flat[-1] = 1


def test_a_file_that_cannot_be_mapped_is_an_error() -> None:
    with Path("/dev/null").open("rb") as file, pytest.raises(OSError):
        Mapping(HUGE_BYTES, file.fileno())
