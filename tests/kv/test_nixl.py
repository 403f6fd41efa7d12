"""What `nixl` does with READs that do not end, on an agent that ends them when it is told to."""

import base64
import queue
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kv.conftest import MakeSegment, node_of
from slipstream.kv import nixl_reads
from slipstream.kv.nixl import NixlTransport
from slipstream.kv.nixl_agent import NixlAgent, NixlError, nixl_installed
from slipstream.kv.nixl_reads import SLABS_MAX, SLABS_PER_PEER
from slipstream.kv.segment import Segment
from slipstream.kv.transport import Digests, Read, TransferError
from slipstream.messages import NodeInfo

WAIT_S = 20.0
STEP = 2
"""Blocks of a slab."""


class FakeAgent:
    """Lists are arrays of addresses in this process; a READ is carried out by `finish`."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.added: list[bytes] = []
        self.removed: list[str] = []
        self.lists: dict[int, tuple[str, int]] = {}
        self.posted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.reads: dict[int, tuple[np.ndarray, list[int], list[int]]] = {}
        self.ended: dict[int, str] = {}
        self.released: list[int] = []
        self.source: np.ndarray | None = None
        self.refuses = ""
        self.breaks: list[Exception] = []
        self.readers = self.readers_closed = 0

    def reader(self) -> "FakeAgent":
        self.readers += 1
        return self

    def register(self, memory: np.ndarray) -> None:
        self.memory[memory.ctypes.data] = memory

    def serve(self, base: int, num_bytes: int, gpu: int | None) -> None:
        pass

    def metadata(self) -> bytes:
        return b"ours"

    def add(self, metadata: bytes) -> str:
        if metadata == b"bad":
            raise NixlError("bad")
        self.added.append(metadata)
        return metadata.decode()

    def remove(self, name: str) -> None:
        self.removed.append(name)

    def prepare(
        self, name: str, base: int, count: int, row_bytes: int, gpu: int | None = None
    ) -> int:
        self.lists[len(self.lists)] = (name, base)
        return len(self.lists) - 1

    def release_list(self, handle: int) -> None:
        pass

    def post(self, ours: int, our_rows: range, theirs: int, rows: list[int]) -> int:
        if self.refuses:
            raise NixlError(self.refuses)
        handle = len(self.reads)
        self.reads[handle] = (self.memory[self.lists[ours][1]], list(our_rows), list(rows))
        self.posted.put(handle)
        return handle

    def running(self, handle: int) -> bool:
        if self.breaks:
            raise self.breaks.pop()
        if self.ended.get(handle):
            raise NixlError(self.ended[handle])
        return handle not in self.ended

    def release(self, handle: int) -> None:
        assert handle in self.ended
        self.released.append(handle)

    def close(self) -> None:
        self.readers_closed += 1

    def finish(self, handle: int, error: str = "") -> None:
        memory, to, rows = self.reads[handle]
        assert self.source is not None
        memory[to] = self.source[rows]
        self.ended[handle] = error


Bench = tuple[FakeAgent, NixlTransport, NodeInfo, Segment, Segment]
Results = queue.SimpleQueue[Digests | TransferError]


@pytest.fixture
def bench(make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(nixl_reads, "SLAB_BYTES", STEP * 4096)
    source, ours = make_segment("prefill-0", num_blocks=40), make_segment("decode-0", fill=2)
    agent = FakeAgent()
    agent.source = source.blocks
    transport = NixlTransport(agent, ours.blocks)  # type: ignore[arg-type]
    peer = node_of(source, {"nixl": address(b"p")})
    transport.connect(peer)
    yield agent, transport, peer, source, ours
    transport.close()


def address(metadata: bytes, base: int = 0) -> str:
    return base64.b64encode(msgspec.msgpack.encode((metadata, base))).decode()


def begin(bench: Bench, blocks: list[int], timeout_s: float = WAIT_S) -> Results:
    _, transport, peer, _, ours = bench
    results: Results = queue.SimpleQueue()
    deadline_s = time.monotonic() + timeout_s
    rows = range(len(blocks))
    transport.read(Read(peer, blocks, ours.blocks, rows, deadline_s, results.put))
    return results


def posted(agent: FakeAgent, count: int) -> list[int]:
    return [agent.posted.get(timeout=WAIT_S) for _ in range(count)]


def test_chunks_may_land_in_any_order(bench: Bench) -> None:
    agent, _, _, source, ours = bench
    results = begin(bench, [9, 3, 7, 1, 5])
    first, second = posted(agent, 2)
    agent.finish(second)
    (third,) = posted(agent, 1)
    agent.finish(third)
    assert results.empty()
    agent.finish(first)
    digests = results.get(timeout=WAIT_S)
    assert isinstance(digests, tuple) and len(digests) == 5
    assert (ours.blocks[:5] == source.blocks[[9, 3, 7, 1, 5]]).all()


def test_what_was_given_up_is_over_for_the_pool_and_not_for_its_slabs(bench: Bench) -> None:
    """NIXL writes late: into the slab, which serves nobody else until then."""
    agent, _, _, source, ours = bench
    before = ours.blocks.copy()
    late = begin(bench, [9, 3, 7, 1], timeout_s=0.02)
    hung = posted(agent, 2)
    assert str(late.get(timeout=WAIT_S)) == "timeout"
    results = begin(bench, [4])
    (other,) = posted(agent, 1)
    assert agent.reads[other][0] is not agent.reads[hung[0]][0]
    assert agent.reads[other][0] is not agent.reads[hung[1]][0]
    for handle in hung:
        agent.finish(handle)
    assert (ours.blocks == before).all()
    agent.finish(other)
    assert isinstance(results.get(timeout=WAIT_S), tuple)
    assert (ours.blocks[0] == source.blocks[4]).all()
    assert (ours.blocks[1:] == before[1:]).all() and late.empty()
    for _ in range(2):  # both slabs are free again
        again = begin(bench, [1, 2, 3, 4])
        for handle in posted(agent, 2):
            agent.finish(handle)
        assert isinstance(again.get(timeout=WAIT_S), tuple)
    assert len({id(memory) for memory, _, _ in agent.reads.values()}) == 3


def test_a_peer_that_hangs_takes_its_share_of_the_slabs_and_no_more(bench: Bench) -> None:
    agent, transport, peer, _, ours = bench
    lost = [begin(bench, [1, 2, 3, 4], timeout_s=0.05) for _ in range(SLABS_PER_PEER)]
    hung = posted(agent, SLABS_PER_PEER)
    assert [str(one.get(timeout=WAIT_S)) for one in lost] == ["timeout"] * len(lost)
    assert agent.posted.empty() and SLABS_PER_PEER < SLABS_MAX
    other = msgspec.structs.replace(peer, node_id="prefill-1")
    transport.connect(other)
    results: Results = queue.SimpleQueue()
    transport.read(Read(other, [1], ours.blocks, [1], time.monotonic() + WAIT_S, results.put))
    agent.finish(*posted(agent, 1))
    assert isinstance(results.get(timeout=WAIT_S), tuple)
    for handle in hung:
        agent.finish(handle)
    again = begin(bench, [5])
    agent.finish(*posted(agent, 1))
    assert isinstance(again.get(timeout=WAIT_S), tuple)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_lost_connection_ends_its_reads_and_is_made_anew(bench: Bench, when: str) -> None:
    agent, transport, peer, _, _ = bench
    if when == "at once":
        agent.refuses = "disconnected"
        results = begin(bench, [1, 2, 3])
    else:
        results = begin(bench, [1, 2, 3])
        for handle in posted(agent, 2):
            agent.finish(handle, "disconnected")
    assert str(results.get(timeout=WAIT_S)) == "peer: disconnected"
    agent.refuses = ""
    assert str(begin(bench, [1]).get(timeout=WAIT_S)).startswith("peer")
    transport.connect(peer)
    results = begin(bench, [1])
    agent.finish(*posted(agent, 1))
    assert isinstance(results.get(timeout=WAIT_S), tuple)
    assert (agent.added, agent.removed) == ([b"p", b"p"], ["p"])


def test_a_peer_is_let_go_only_after_its_reads(bench: Bench) -> None:
    """NIXL says nothing about READs of an agent that it was told to forget."""
    agent, transport, peer, _, _ = bench
    results = begin(bench, [1])
    (handle,) = posted(agent, 1)
    transport.forget(peer.node_id)
    with pytest.raises(TransferError, match="still run"):
        transport.connect(peer)
    transport.connect(msgspec.structs.replace(peer, epoch=peer.epoch + 1))
    assert not agent.removed
    agent.finish(handle)
    assert isinstance(results.get(timeout=WAIT_S), tuple)
    transport.connect(peer)
    assert "p" in agent.removed


def test_closing_ends_what_hangs(bench: Bench) -> None:
    agent, transport, peer, _, _ = bench
    results = begin(bench, [1, 2, 3])
    posted(agent, 2)
    transport.close()
    assert str(results.get(timeout=WAIT_S)) == "closed"
    assert str(begin(bench, [1]).get(timeout=WAIT_S)) == "closed"
    with pytest.raises(TransferError, match="closed"):
        transport.connect(peer)


def test_nothing_is_copied_after_a_chunk_that_could_not_be_posted(bench: Bench) -> None:
    agent, transport, _, _, ours = bench
    before = ours.blocks.copy()
    results = begin(bench, list(range(3 * STEP)))
    first, _ = posted(agent, 2)
    agent.refuses = "gone"
    agent.finish(first)
    assert str(results.get(timeout=WAIT_S)) == "peer: gone"
    transport.close()
    assert (ours.blocks == before).all()


@pytest.mark.parametrize("told", ["§", "AAAA", address(b"bad"), ""])
def test_an_address_that_is_none(bench: Bench, told: str) -> None:
    _, transport, peer, _, _ = bench
    assert peer.worker is not None
    worker = msgspec.structs.replace(peer.worker, transports={"nixl": told})
    with pytest.raises(TransferError) as raised:
        transport.connect(msgspec.structs.replace(peer, node_id="x", worker=worker))
    assert raised.value.cause == "attach"


@pytest.mark.parametrize("base", [-1, -(1 << 63), (1 << 64) - 40 * 4096 + 1, (1 << 64) - 1])
def test_a_pool_that_no_process_has(bench: Bench, base: int) -> None:
    agent, transport, peer, _, _ = bench
    assert peer.worker is not None
    worker = msgspec.structs.replace(peer.worker, transports={"nixl": address(b"x", base)})
    with pytest.raises(TransferError) as raised:
        transport.connect(msgspec.structs.replace(peer, node_id="x", worker=worker))
    assert raised.value.cause == "malformed" and agent.added == [b"p"]
    results = begin(bench, [1])
    agent.finish(*posted(agent, 1))
    assert isinstance(results.get(timeout=WAIT_S), tuple)


def test_who_is_told_nonsense_by_nixl_begins_anew(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """All READs end, once; what they were to fill is left alone; peers are connected again."""
    agent, transport, peer, _, ours = bench
    before = ours.blocks.copy()
    begun = [begin(bench, [1, 2]), begin(bench, [3, 4])]
    late = posted(agent, 2)
    agent.breaks.append(RuntimeError("nonsense"))
    for results in begun:
        assert str(results.get(timeout=WAIT_S)) == "internal: RuntimeError: nonsense"
    assert len([record for record in caplog.records if record.exc_info]) == 1
    for handle in late:
        agent.finish(handle)
    assert agent.readers_closed == 1
    assert str(begin(bench, [1]).get(timeout=WAIT_S)).startswith("peer"), "and is tried anew"
    transport.connect(peer)
    results = begin(bench, [7])
    agent.finish(*posted(agent, 1))
    assert isinstance(results.get(timeout=WAIT_S), tuple)
    assert (ours.blocks[1:] == before[1:]).all()
    assert agent.readers == 2 and all(results.empty() for results in begun)


def test_no_memory_for_a_slab_is_said_to_whoever_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, _, _, _, _ = bench

    def refuse(memory: np.ndarray) -> None:
        raise NixlError("locked memory is used up")

    monkeypatch.setattr(agent, "register", refuse)
    found = str(begin(bench, [1]).get(timeout=WAIT_S))
    assert found == "internal: no memory for READs: locked memory is used up"
    monkeypatch.undo()
    assert agent.readers == 1


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}._bindings", None)
    with pytest.raises(NixlError, match=r"pip install 'slipstream\[nixl\]'"):
        NixlAgent("a")


@pytest.mark.skipif(not nixl_installed(), reason="no package nixl")
def test_a_closed_reader_is_gone_whoever_keeps_its_errors() -> None:
    """Its slabs go next: nothing may write into them from here on."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    agent = NixlAgent("a")
    agent.reader().close()  # the first one leaves a socket to UCX
    before = open_files()
    reader = agent.reader()
    assert open_files() > before
    with pytest.raises(NixlError) as kept:
        reader.add(b"nonsense")
    reader.close()
    assert open_files() == before, kept.value
    agent.close()
