"""READs between two network namespaces: what comes goes over the wire, and is right."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kv.conftest import child_environment
from netns import Joined, joined, refusal
from slipstream.kv.bus import bus_address
from slipstream.kv.digest import block_digests
from slipstream.kv.offers import Pool, offer
from slipstream.kv.probe import LAYOUT, Probe, ProbePool, block_bytes_of
from slipstream.kv.segment import SegmentHeader, create_segment
from slipstream.kv.transport import read_now

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
    header = SegmentHeader(
        kv_layout_id=LAYOUT, epoch=9, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES
    )
    ours = create_segment(tmp_path / "ours", header)
    pool = ProbePool(tmp_path, "p", NUM_BLOCKS, BLOCK_BYTES)
    environ = child_environment() | {"UCX_NET_DEVICES": link.there}
    probe = Probe(pool, kind, f"tcp://{link.theirs}:1", link.wrap, environ)
    bind = bus_address(f"tcp://{link.ours}:1", str(tmp_path), "d")
    ((transport,), _) = offer(kind, Pool(ours, "d", bind, ""))
    try:
        transport.connect(probe.info)
        read = read_now(transport, probe.info, ROWS, ours.blocks, ROWS, WAIT_S)
        expected = np.concatenate([block_bytes_of(block, BLOCK_BYTES) for block in ROWS])
        assert (ours.blocks == expected).all()
        assert read == block_digests(expected, ROWS)
        assert link.received_bytes > ours.blocks.nbytes
    finally:
        transport.close()
        probe.stop()
        ours.close()
