"""The named pool: who may map it, who cleans up, what happens without room."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kv.conftest import MakeSegment, header
from slipstream.config import StartError
from slipstream.kv.segment import (
    HEADER_BYTES,
    MAGIC,
    SegmentError,
    attach_segment,
    create_segment,
    remove_dead_segments,
    segment_path,
)


def test_a_peer_sees_what_the_owner_writes_and_cannot_write(make_segment: MakeSegment) -> None:
    segment = make_segment()
    theirs = attach_segment(segment.path, segment.header)
    assert (theirs == segment.blocks).all()
    segment.blocks[3] = 9
    assert (theirs[3] == 9).all()
    with pytest.raises(ValueError, match="read-only"):
        theirs[3] = 1


def test_a_new_segment_is_private_page_aligned_and_zero(make_segment: MakeSegment) -> None:
    segment = make_segment(fill=None)
    assert segment.path.stat().st_mode & 0o777 == 0o600
    assert segment.blocks.ctypes.data % HEADER_BYTES == 0
    assert segment.blocks.flags.c_contiguous
    assert not segment.blocks.any()


@pytest.mark.parametrize(
    "change",
    [{"epoch": 8}, {"num_blocks": 11}, {"block_bytes": 2048}, {"kv_layout_id": "other"}],
)
def test_any_other_header_is_refused(make_segment: MakeSegment, change: dict[str, object]) -> None:
    segment = make_segment()
    with pytest.raises(SegmentError, match="expected"):
        attach_segment(segment.path, msgspec.structs.replace(segment.header, **change))


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, HEADER_BYTES + 11 * 4096])
def test_a_torn_file_is_refused(make_segment: MakeSegment, size: int) -> None:
    segment = make_segment()
    os.truncate(segment.path, size)
    with pytest.raises(SegmentError):
        attach_segment(segment.path, segment.header)


@pytest.mark.parametrize("page", [b"", os.urandom(HEADER_BYTES), MAGIC + b"\xff" * HEADER_BYTES])
def test_any_other_file_is_refused(tmp_path: Path, page: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(page)
    with pytest.raises(SegmentError):
        attach_segment(path, header())
    with pytest.raises(SegmentError):
        attach_segment(tmp_path / "missing", header())


def test_a_link_is_not_followed(make_segment: MakeSegment, tmp_path: Path) -> None:
    segment = make_segment()
    link = tmp_path / "link"
    link.symlink_to(segment.path)
    with pytest.raises(SegmentError):
        attach_segment(link, segment.header)


def test_closing_removes_the_name_and_leaves_mapped_memory(make_segment: MakeSegment) -> None:
    segment = make_segment()
    theirs = attach_segment(segment.path, segment.header)
    before = segment.blocks.copy()
    segment.close()
    segment.close()
    assert not segment.path.exists()
    assert (theirs == before).all()


OWNER = """
import os, signal, sys
from pathlib import Path
from slipstream.kv.segment import SegmentHeader, create_segment
words = SegmentHeader(kv_layout_id="x", epoch=1, num_blocks=1, block_bytes=4096)
segments = [create_segment(Path(path), words) for path in sys.argv[1:]]
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_segments_of_dead_processes_of_this_node_are_removed(
    make_segment: MakeSegment, tmp_path: Path
) -> None:
    def name(node_id: str, run: str = "r1", epoch: int = 1) -> Path:
        return segment_path(str(tmp_path), f"/run/{run}", node_id, epoch)

    ours = [name("prefill-1"), name("prefill-1", epoch=22)]
    others = [name("prefill-10"), name("prefill"), name("prefill-1", run="r2"), name("a.prefill-1")]
    done = subprocess.run(
        [sys.executable, "-c", OWNER, *map(str, ours + others)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -9
    living = make_segment("prefill-1", epoch=3)
    assert remove_dead_segments(str(tmp_path), "/elsewhere/r1", "prefill-1") == ours
    assert living.path.exists()
    assert all(path.exists() for path in others)
    assert not any(path.exists() for path in ours)
    assert remove_dead_segments(str(tmp_path), "/elsewhere/r1", "prefill") == [name("prefill")]
    assert all(path.exists() for path in others if path != name("prefill"))
    for path in others[:1] + others[2:]:  # as a container leaves it that nobody starts again
        os.utime(path, (0, 0))
    os.utime(living.path, (0, 0))
    old = [name("prefill-10"), name("a.prefill-1")]
    assert sorted(remove_dead_segments(str(tmp_path), "/elsewhere/r1", "prefill")) == sorted(old)
    assert living.path.exists() and name("prefill-1", run="r2").exists()


def test_no_room_is_one_line_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StartError, match=r"needs 4.0GiB, .*B available") as raised:
        create_segment(tmp_path / "pool", header(num_blocks=1 << 20))
    assert raised.value.exit_code == 6
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_no_folder_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="--shm-dir"):
        create_segment(tmp_path / "missing" / "pool", header())
