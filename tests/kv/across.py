"""A READ in a process that has met no network interface yet: UCX looks for them once."""

from pathlib import Path

import numpy as np

from slipstream.kv.bus import bus_address
from slipstream.kv.offers import Pool, offer
from slipstream.kv.probe import LAYOUT, block_bytes_of
from slipstream.kv.segment import SegmentHeader, create_segment
from slipstream.kv.transport import Digests, read_now
from slipstream.messages import NodeInfo

WAIT_S = 60.0


def read_all(peer: NodeInfo, kind: str, address: str, folder: str) -> tuple[Digests, list[bool]]:
    """All blocks of a probe; their digests, and whether each is the one that the probe drew."""
    assert peer.worker is not None
    count, block_bytes = peer.worker.num_blocks, peer.worker.block_bytes
    header = SegmentHeader(kv_layout_id=LAYOUT, epoch=9, num_blocks=count, block_bytes=block_bytes)
    ours = create_segment(Path(folder) / "ours", header)
    bind = bus_address(f"tcp://{address}:1", folder, "d")
    ((transport,), _) = offer(kind, Pool(ours, "d", bind, ""))
    try:
        transport.connect(peer)
        digests = read_now(transport, peer, range(count), ours.blocks, range(count), WAIT_S)
        same = [
            np.array_equal(ours.blocks[i], block_bytes_of(i, block_bytes)[0]) for i in range(count)
        ]
        return digests, same
    finally:
        transport.close()
        ours.close()
