"""Copy of blocks with their digests in the same pass: compiled, or block by block in Python.

Both give the same digests (XXH3-128), so a host with a compiler and one without agree.
"""

import ctypes
import functools
import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from slipstream.kernels.build import BuildError, Level, build, default_cache_dir, one_line, wanted

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("verified_copy.cpp")
DIGEST_BYTES = 16
SHORTEST_BYTES = 241
"""Shorter inputs have another algorithm, which only the library has."""

Rows: TypeAlias = NDArray[np.uint8]


def built(cache_dir: Path, level: Level | None = None) -> Path:
    """As `build.build`."""
    return build(cache_dir, _SOURCE, (), (), (), level)


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """None if `SLIPSTREAM_CPU_KERNELS=0`, or if it cannot be built."""
    if not wanted():
        return None
    try:
        library = ctypes.CDLL(str(built(default_cache_dir())))
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        _LOG.warning("SLOW: KV blocks are copied and digested one by one: %s", one_line(error))
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.verified_copy.argtypes = (pointer,) * 4 + (integer,) * 2 + (pointer,)
    library.verified_copy.restype = None
    return library


def verified_copy(
    source: Rows, source_rows: Sequence[int], target: Rows, target_rows: Sequence[int], digest: bool
) -> tuple[bytes, ...]:
    """Copies rows of `source` into rows of `target`, both uint8 `[rows, bytes]`, contiguous.

    Returns the XXH3-128 of each row as it was stored, 16 bytes each; none without `digest`. Each
    byte of the source is read once. The GIL is released. IndexError: no such row.
    """
    if len(source_rows) != len(target_rows) or source.shape[1] != target.shape[1]:
        raise ValueError(f"{len(source_rows)} rows {source.shape} -> {target_rows} {target.shape}")
    library = compiled()
    if library is None or source.shape[1] < SHORTEST_BYTES:
        return _one_by_one(source, source_rows, target, target_rows, digest)
    return _call(library, source, source_rows, target, target_rows, digest)


def digests(source: Rows, rows: Sequence[int]) -> tuple[bytes, ...]:
    """The XXH3-128 of each row. IndexError: no such row."""
    library = compiled()
    if library is None or source.shape[1] < SHORTEST_BYTES:
        return tuple(xxh3_128_digest(source[_checked(row, source)]) for row in rows)
    return _call(library, source, rows, None, (), True)


def _call(
    library: ctypes.CDLL,
    source: Rows,
    source_rows: Sequence[int],
    target: Rows | None,
    target_rows: Sequence[int],
    digest: bool,
) -> tuple[bytes, ...]:
    count, num_bytes = len(source_rows), source.shape[1]
    from_rows, to_rows = _indices(source_rows, source), None
    if target is not None:
        assert target.flags.writeable
        to_rows = _indices(target_rows, target)
    out = ctypes.create_string_buffer(DIGEST_BYTES * count) if digest else None
    library.verified_copy(
        source.ctypes.data,
        from_rows.ctypes.data,
        None if target is None else target.ctypes.data,
        None if to_rows is None else to_rows.ctypes.data,
        count,
        num_bytes,
        out,
    )
    if out is None:
        return ()
    packed = out.raw
    return tuple(packed[i : i + DIGEST_BYTES] for i in range(0, len(packed), DIGEST_BYTES))


def _one_by_one(
    source: Rows, source_rows: Sequence[int], target: Rows, target_rows: Sequence[int], digest: bool
) -> tuple[bytes, ...]:
    """The digest is of the target while it is still in the cache: what was stored, not the source,
    which may have changed since."""
    made = []
    for source_row, target_row in zip(source_rows, target_rows, strict=True):
        row = target[_checked(target_row, target)]
        np.copyto(row, source[_checked(source_row, source)])
        if digest:
            made.append(xxh3_128_digest(row))
    return tuple(made)


def _indices(rows: Sequence[int], array: Rows) -> NDArray[np.int64]:
    assert array.flags.c_contiguous and array.dtype == np.uint8
    indices = np.asarray(rows, np.int64)
    if len(indices) and (indices.min() < 0 or indices.max() >= len(array)):
        raise IndexError(f"no such row in {len(array)}: {min(rows)} .. {max(rows)}")
    return indices


def _checked(row: int, array: Rows) -> int:
    if not 0 <= row < len(array):
        raise IndexError(f"no such row in {len(array)}: {row}")
    return row
