"""READs between two network namespaces: what comes goes over the wire, and is right."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from kv.across import read_all
from kv.conftest import child_environment
from netns import Joined, joined, refusal
from slipstream.kv.digest import block_digests
from slipstream.kv.probe import Probe, ProbePool, block_bytes_of

WAIT_S = 60.0
NUM_BLOCKS, BLOCK_BYTES = 32, 360 << 10
ROWS = range(NUM_BLOCKS)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Joined]:
    if why := refusal():
        pytest.skip(why)
    with joined() as pair:
        monkeypatch.setenv("UCX_TLS", "tcp")  # one kernel: it would see through the namespaces
        monkeypatch.setenv("UCX_NET_DEVICES", pair.interface)
        yield pair


@pytest.mark.parametrize("kind", ["nixl", "bus"])
def test_blocks_cross_from_one_host_to_the_other(link: Joined, tmp_path: Path, kind: str) -> None:
    pool = ProbePool(tmp_path, "p", NUM_BLOCKS, BLOCK_BYTES)
    environ = child_environment() | {"UCX_NET_DEVICES": link.there}
    probe = Probe(pool, kind, f"tcp://{link.theirs}:1", link.wrap, environ)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as reader:
            work = reader.submit(read_all, probe.info, kind, link.ours, str(tmp_path))
            read, same = work.result(WAIT_S)
    finally:
        probe.stop()
    assert same == [True] * NUM_BLOCKS
    drawn = [block_bytes_of(block, BLOCK_BYTES) for block in ROWS]
    assert read == block_digests(np.concatenate(drawn), ROWS)
    assert link.received_bytes > NUM_BLOCKS * BLOCK_BYTES
