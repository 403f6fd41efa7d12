"""The compiled pass and the one in Python copy alike, and their digests are XXH3-128."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from slipstream.kernels import verified_copy as module
from slipstream.kernels.build import wanted
from slipstream.kernels.verified_copy import compiled, digests, verified_copy


@pytest.fixture(params=["compiled", "python"], scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled":
        if not wanted():
            pytest.skip("no compiled kernels wanted")
        assert compiled() is not None
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compiled", lambda: None)
        yield request.param


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_and_digests(way: str, data: st.DataObject) -> None:
    """Sizes around every border of the algorithm: 64 of a stripe, 1024 of a segment, 240."""
    near = st.sampled_from([64, 128, 240, 256, 1024, 1088, 2048, 4096, 46_080])
    num_bytes = max(1, data.draw(near) + data.draw(st.integers(-2, 66)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    source = random.integers(0, 256, (5, num_bytes), np.uint8)
    target = random.integers(0, 256, (6, num_bytes), np.uint8)
    to = data.draw(st.lists(st.integers(0, 5), unique=True))
    rows = data.draw(st.lists(st.integers(0, 4), min_size=len(to), max_size=len(to)))
    expected = target.copy()
    expected[to] = source[rows]
    of_rows = tuple(xxh3_128_digest(source[row]) for row in rows)
    bare = target.copy()
    assert verified_copy(source, rows, target, to, True) == of_rows
    assert verified_copy(source, rows, bare, to, False) == ()
    assert (target == expected).all() and (bare == expected).all()
    assert digests(source, rows) == of_rows


@pytest.mark.parametrize(("rows", "to"), [([5], [0]), ([-1], [0]), ([0], [6]), ([0], [-1])])
def test_rows_that_are_not_there(way: str, rows: list[int], to: list[int]) -> None:
    source, target = np.ones((5, 1000), np.uint8), np.zeros((6, 1000), np.uint8)
    with pytest.raises(IndexError):
        verified_copy(source, rows, target, to, True)
    assert not target.any()


def test_rows_that_do_not_pair(way: str) -> None:
    source, target = np.ones((5, 1000), np.uint8), np.zeros((6, 1000), np.uint8)
    with pytest.raises(ValueError, match="2 rows"):
        verified_copy(source, [1, 2], target, [1], True)
    with pytest.raises(ValueError, match="999"):
        verified_copy(source, [1], np.zeros((6, 999), np.uint8), [1], True)


def test_the_digest_is_of_what_was_stored_while_the_source_changes(way: str) -> None:
    """A lease that lapses lets its owner write under the copy: bytes and digest still agree."""
    source, target = np.zeros((4, 1 << 20), np.uint8), np.zeros((4, 1 << 20), np.uint8)
    stop = threading.Event()

    def write() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            source[:] = value % 256

    writer = threading.Thread(target=write)
    writer.start()
    torn, deadline_s = 0, time.monotonic() + 60.0
    try:
        while torn < 3 and time.monotonic() < deadline_s:
            made = verified_copy(source, range(4), target, range(4), True)
            assert made == tuple(xxh3_128_digest(row) for row in target)
            torn += any(row.min() != row.max() for row in target)
    finally:
        stop.set()
        writer.join()
    assert torn  # else nothing was put to the test


def test_without_a_compiler_it_is_said_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SLIPSTREAM_CPU_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled.__wrapped__() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "SLOW" in record.message
