"""READs from a process of its own that is killed, stopped, restarted or whose bytes change."""

import functools
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kv.conftest import child_environment
from slipstream.kv.bus import bus_address
from slipstream.kv.bus_reader import BusReads
from slipstream.kv.digest import block_digests
from slipstream.kv.nixl_reads import NixlReads
from slipstream.kv.offers import Pool, offer
from slipstream.kv.probe import LAYOUT, Probe, ProbePool, block_bytes_of
from slipstream.kv.segment import Segment, SegmentHeader, create_segment
from slipstream.kv.transport import Digests, Read, TransferError, Transport, read_now
from slipstream.messages import NodeInfo

WAIT_S = 30.0
SHORT_S = 0.3
NUM_BLOCKS, BLOCK_BYTES = 64, 256 << 10
ROWS = range(NUM_BLOCKS)

Start = Callable[..., Probe]


@pytest.fixture(params=["shm", "bus", "nixl", "nixl over tcp"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For UCX the environment decides which of its own transports it takes."""
    name, _, tcp = str(request.param).partition(" over ")
    if tcp:
        monkeypatch.setenv("UCX_TLS", tcp)
    return name


@pytest.fixture
def start(tmp_path: Path, kind: str) -> Iterator[Start]:
    running: list[Probe] = []

    def begin(epoch: int = 1, node_id: str = "p") -> Probe:
        pool = ProbePool(tmp_path, node_id, NUM_BLOCKS, BLOCK_BYTES, epoch)
        running.append(Probe(pool, kind, environ=child_environment()))
        return running[-1]

    yield begin
    for probe in running:
        probe.stop()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Segment]:
    header = SegmentHeader(
        kv_layout_id=LAYOUT, epoch=9, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES
    )
    segment = create_segment(tmp_path / "ours", header)
    yield segment
    segment.close()


@pytest.fixture
def transport(kind: str, ours: Segment, tmp_path: Path) -> Iterator[Transport]:
    bind = bus_address("ipc:///x", str(tmp_path), "d")
    ((made,), _) = offer(kind, Pool(ours, "d", bind, "ipc:///x"))
    yield made
    made.close()


@functools.cache
def expected() -> np.ndarray:
    return np.concatenate([block_bytes_of(block, BLOCK_BYTES) for block in ROWS])


def test_what_arrives_is_what_is_there_and_one_flipped_bit_is_seen(
    start: Start, transport: Transport, ours: Segment
) -> None:
    probe = start()
    transport.connect(probe.info)
    announced = block_digests(expected(), ROWS)
    assert read_now(transport, probe.info, ROWS, ours.blocks, ROWS, WAIT_S) == announced
    assert (ours.blocks == expected()).all()
    probe.flip(17)
    read = read_now(transport, probe.info, ROWS, ours.blocks, ROWS, WAIT_S)
    assert [i for i in ROWS if read[i] != announced[i]] == [17]
    assert read == block_digests(ours.blocks, ROWS)


def read_through(
    fault: Callable[[], None], transport: Transport, peer: NodeInfo, ours: Segment
) -> str:
    """READs, one after the other, of which one is under way when the fault happens; then one more.

    Each is whole or fails. The cause of the first that fails, or nothing.
    """
    happened = threading.Event()

    def happen() -> None:
        fault()
        happened.set()

    timer = threading.Timer(0.05, happen)
    timer.start()
    over = False
    while not over:
        over = happened.is_set()
        ours.blocks[:] = 0
        try:
            read_now(transport, peer, ROWS, ours.blocks, ROWS, SHORT_S)
        except TransferError as error:
            timer.join()
            return error.cause
        assert (ours.blocks == expected()).all()
    return ""


def test_a_peer_killed_in_mid_read(start: Start, transport: Transport, ours: Segment) -> None:
    """A restarted one is usable at once."""
    probe = start()
    transport.connect(probe.info)
    cause = read_through(probe.process.kill, transport, probe.info, ours)
    if transport.name == "shm":
        assert not cause  # memory outlives its process, and is judged by epoch
    else:
        assert cause in ("peer", "timeout")
    left = ours.blocks.copy()
    transport.forget(probe.info.node_id)
    again = start(epoch=2)
    transport.connect(again.info)
    other = np.zeros_like(left)
    read_now(transport, again.info, ROWS, other, ROWS, WAIT_S)
    assert (other == expected()).all()
    assert (ours.blocks == left).all()


def test_a_peer_that_hangs_in_mid_read_writes_nothing_later_and_may_come_back(
    start: Start, transport: Transport, ours: Segment
) -> None:
    probe = start()
    transport.connect(probe.info)
    stop = functools.partial(probe.process.send_signal, signal.SIGSTOP)
    cause = read_through(stop, transport, probe.info, ours)
    if os.environ.get("UCX_TLS") == "tcp" or transport.name == "bus":
        assert cause == "timeout"
    else:  # one side alone can copy, and nobody is missed; UCX may not be allowed to
        assert not cause or (transport.name, cause) == ("nixl", "timeout")
    left = ours.blocks.copy()
    probe.process.send_signal(signal.SIGCONT)
    other = np.zeros_like(left)
    read_now(transport, probe.info, ROWS, other, ROWS, WAIT_S)
    assert (other == expected()).all()
    assert (ours.blocks == left).all()


def test_an_error_of_ours_while_a_peer_hangs(
    start: Start, transport: Transport, ours: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session that ends takes the READ along: nothing of it is written when the peer goes on,
    and others are read from meanwhile."""
    probe, other = start(), start(epoch=2, node_id="q")
    transport.connect(probe.info)
    read_now(transport, probe.info, ROWS, ours.blocks, ROWS, WAIT_S)
    probe.process.send_signal(signal.SIGSTOP)
    left, results = ours.blocks.copy(), queue.SimpleQueue[Digests | TransferError]()
    deadline_s = time.monotonic() + WAIT_S
    transport.read(Read(probe.info, ROWS, ours.blocks, ROWS, deadline_s, results.put))
    session = {"bus": BusReads, "nixl": NixlReads}.get(transport.name)
    if session is not None:
        with monkeypatch.context() as patch:
            patch.setattr(session, "begin", None)
            with pytest.raises(TransferError, match="internal"):
                read_now(transport, probe.info, ROWS, ours.blocks, ROWS, WAIT_S)
    ended = results.get(timeout=WAIT_S)
    if isinstance(ended, tuple):  # one side alone can copy, and was through by then
        assert transport.name != "bus" and os.environ.get("UCX_TLS") != "tcp"
    else:
        assert session is not None and ended.cause == "internal"
    into = np.zeros_like(left)
    transport.connect(other.info)
    read_now(transport, other.info, ROWS, into, ROWS, WAIT_S)
    assert (into == expected()).all()
    probe.process.send_signal(signal.SIGCONT)
    read_now(transport, other.info, ROWS, into, ROWS, WAIT_S)
    assert (ours.blocks == left).all()


def test_another_process_of_that_name_is_not_taken_for_the_first(
    start: Start, transport: Transport, ours: Segment
) -> None:
    """Neither the old one's memory for the new one's, nor what the new one has for the old one's.
    The bus alone connects by itself."""
    first = start()
    transport.connect(first.info)
    read_now(transport, first.info, ROWS, ours.blocks, ROWS, WAIT_S)
    first.process.kill()
    first.process.wait()
    second = start(epoch=2)
    second.flip(1)
    ours.blocks[:] = 0
    if transport.name == "bus":
        read_now(transport, second.info, [1], ours.blocks, [1], WAIT_S)
        assert [b.sum() for b in ours.blocks[1] ^ expected()[1] if b] == [1], "the new one's"
        with pytest.raises(TransferError, match="epoch"):
            read_now(transport, first.info, [0], ours.blocks, [0], WAIT_S)
    else:
        with pytest.raises(TransferError, match="epoch"):
            read_now(transport, second.info, [1], ours.blocks, [1], SHORT_S)
    assert not ours.blocks[0].any(), "nothing was stored of what was refused"
    transport.connect(second.info)
    read_now(transport, second.info, ROWS, ours.blocks, ROWS, WAIT_S)
    second.flip(1)
    assert [i for i in ROWS if (ours.blocks[i] != expected()[i]).any()] == [1]
    with pytest.raises(TransferError, match="epoch"):
        read_now(transport, first.info, [0], ours.blocks, [0], WAIT_S)
