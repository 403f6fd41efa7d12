"""Memory that is asked for is there before the start, or one line says what to do."""

import os
from pathlib import Path

import pytest

from slipstream.config import StartError
from slipstream.errors import ExitCode
from slipstream.runtime.memory import available_memory, require_host_tiers, require_pools

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


def test_memory_for_the_tiers_below_fits_beside_the_pools() -> None:
    require_host_tiers("x", [3 * GIB], [GIB], 4 * GIB)
    require_host_tiers("x", [3 * GIB, 3 * GIB], [GIB, GIB], 8 * GIB)
    require_host_tiers("x", [0], [8 * GIB], GIB)  # none is asked for


@pytest.mark.parametrize(
    ("free", "pools", "words"),
    [
        (3 * GIB, [GIB], "of 3GiB free memory 2GiB are left beside KV pools of 1GiB; lower it or"),
        (GIB >> 10, [GIB], "of 1MiB free memory 0B are left"),
        (8 * GIB - 1, [GIB, GIB], " 6GiB for 2 workers together is too much"),
        (2 * GIB, [0], "2GiB are left; lower it"),
    ],
)
def test_memory_that_is_not_there(free: int, pools: list[int], words: str) -> None:
    with pytest.raises(StartError) as raised:
        require_host_tiers("slipstream decode", [3 * GIB] * len(pools), pools, free)
    line = str(raised.value)
    assert line.startswith("slipstream decode: --offload-host-bytes ") and words in line
    assert raised.value.exit_code == 6 and "\n" not in line


def test_pools_fit_into_what_is_free() -> None:
    require_pools("x", [GIB, GIB], 2 * GIB, "memory")
    with pytest.raises(StartError, match="1GiB are free in /shm; lower it") as raised:
        require_pools("x", [GIB, GIB], GIB, "/shm")
    assert "--kv-cache-bytes 2GiB for 2 workers together is" in str(raised.value)
    assert raised.value.exit_code == ExitCode.MEMORY
