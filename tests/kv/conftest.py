import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from slipstream import curve
from slipstream.kv import nixl_reads
from slipstream.kv.bus import BusTransport, bus_address
from slipstream.kv.nixl import NixlTransport
from slipstream.kv.nixl_agent import NixlAgent
from slipstream.kv.segment import Segment, SegmentHeader, create_segment, segment_path
from slipstream.kv.shm import ShmTransport
from slipstream.kv.transport import Transport
from slipstream.messages import NodeInfo, WorkerInfo
from slipstream.types import Role

LAYOUT = "f00d/float32/l1.h1.t16.d2"

MakeSegment = Callable[..., Segment]
MakeTransport = Callable[..., Transport]
Pair = tuple[Segment, Transport, NodeInfo, Segment]


def child_environment() -> dict[str, str]:
    """A child runs the code that we run."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def header(num_blocks: int = 12, block_bytes: int = 4096, epoch: int = 7) -> SegmentHeader:
    return SegmentHeader(
        kv_layout_id=LAYOUT, epoch=epoch, num_blocks=num_blocks, block_bytes=block_bytes
    )


def node_of(
    segment: Segment, transports: dict[str, str], node_id: str = "prefill-0", host: str = "here"
) -> NodeInfo:
    words = segment.header
    return NodeInfo(
        node_id=node_id,
        role=Role.PREFILL,
        epoch=words.epoch,
        address="ipc:///nowhere",
        host=host,
        worker=WorkerInfo(
            model="toy",
            kv_layout_id=words.kv_layout_id,
            num_blocks=words.num_blocks,
            block_bytes=words.block_bytes,
            max_model_len=64,
            vocab_size=10,
            max_num_seqs=4,
            prefill_budget_tokens=16,
            accept_decode=True,
            transports=transports,
        ),
    )


@pytest.fixture
def make_segment(tmp_path: Path) -> Iterator[MakeSegment]:
    made = []

    def make(node_id: str = "prefill-0", fill: int | None = 1, **words: int) -> Segment:
        words_of = header(**words)
        path = segment_path(str(tmp_path), "/run/r1", node_id, words_of.epoch)
        segment = create_segment(path, words_of)
        if fill is not None:
            drawn = np.random.default_rng(fill)
            segment.blocks[:] = drawn.integers(0, 256, segment.blocks.shape, np.uint8)
        made.append(segment)
        return segment

    yield make
    for segment in made:
        segment.close()


@pytest.fixture
def make_transport(tmp_path: Path) -> Iterator[MakeTransport]:
    """`shm`, `nixl`, or the bus over `ipc` or `tcp`, or over `curve`: tcp with keys."""
    made: list[Transport] = []
    keys_dir = tmp_path / "keys"
    curve.generate(keys_dir)
    keys = curve.load(str(keys_dir), Role.PREFILL)

    def build(kind: str, segment: Segment, name: str = "a") -> Transport:
        epoch = segment.header.epoch
        match kind:
            case "shm":
                made.append(ShmTransport(segment))
            case "nixl":
                made.append(NixlTransport(NixlAgent(f"{name}@{epoch}"), segment.blocks))
            case _:
                listen = "ipc:///x" if kind == "ipc" else "tcp://127.0.0.1:1"
                bind = bus_address(listen, str(tmp_path), name)
                shown = keys if kind == "curve" else None
                made.append(BusTransport(segment.blocks, epoch, bind, keys=shown))
        return made[-1]

    yield build
    for transport in made:
        transport.close()


@pytest.fixture(params=["shm", "ipc", "tcp", "curve", "nixl"])
def pair(
    request: pytest.FixtureRequest,
    make_transport: MakeTransport,
    make_segment: MakeSegment,
    monkeypatch: pytest.MonkeyPatch,
) -> Pair:
    """Source, our transport, the peer as we know it, our own segment."""
    monkeypatch.setattr(nixl_reads, "SLAB_BYTES", 3 * 4096)
    source, ours = make_segment("prefill-0", num_blocks=40), make_segment("decode-0", fill=2)
    theirs = make_transport(request.param, source, "p")
    transport = make_transport(request.param, ours, "d")
    peer = node_of(source, {theirs.name: theirs.advertise()})
    transport.connect(peer)
    return source, transport, peer, ours
