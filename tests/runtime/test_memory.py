"""Memory that is asked for is there before the start, or one line says what to do."""

import os
from pathlib import Path

import pytest

from slipstream.config import StartError
from slipstream.runtime.memory import available_memory, require_host_tier

GIB = 1 << 30


def test_available_memory_is_that_of_this_host() -> None:
    assert 0 <= available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("limit", "used", "files", "free"),
    [("900", 700, 500, 700), ("900", 700, 0, 200), ("900", 1000, 0, 0), ("max", 700, 500, None)],
)
def test_what_a_control_group_leaves(
    tmp_path: Path, limit: str, used: int, files: int, free: int | None
) -> None:
    """A model that was read lies in memory as a file: that is not lost to anybody."""
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\nactive_file {files}\ninactive_file 0\n")
    found = available_memory(tmp_path)
    assert found > 900 if free is None else found == free


def test_memory_for_the_tier_below_fits_beside_the_pools() -> None:
    require_host_tier("x", 3 * GIB, GIB, 4 * GIB)
    require_host_tier("x", 3 * GIB, GIB, 8 * GIB, workers=2)
    require_host_tier("x", 0, 8 * GIB, GIB)  # none is asked for


@pytest.mark.parametrize(
    ("free", "pool", "workers", "words"),
    [
        (3 * GIB, GIB, 1, "of 3GiB free memory 2GiB are left beside KV pools of 1GiB; lower it or"),
        (GIB >> 10, GIB, 1, "of 1MiB free memory 0B are left"),
        (8 * GIB - 1, GIB, 2, "for each of 2 workers is too much"),
        (2 * GIB, 0, 1, "2GiB are left; lower it"),
    ],
)
def test_memory_that_is_not_there(free: int, pool: int, workers: int, words: str) -> None:
    with pytest.raises(StartError) as raised:
        require_host_tier("slipstream decode", 3 * GIB, pool, free, workers)
    line = str(raised.value)
    assert line.startswith("slipstream decode: --offload-host-bytes 3GiB") and words in line
    assert raised.value.exit_code == 6 and "\n" not in line
