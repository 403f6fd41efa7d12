"""A pool that the host cannot touch: what every transport, digest and tier does with it."""

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.conftest import MakeSegment, header, node_of
from kv.fake_gpu import DEVICE_STEP, FakeDriver, on_device
from slipstream.core.machine import BlocksSaved, LoadBlocks, PullDone, SaveBlocks, SavedBlock
from slipstream.engine.offload import Offload
from slipstream.kv import device as device_module
from slipstream.kv.bus import BusTransport
from slipstream.kv.cuda_driver import CudaError, count_gpus
from slipstream.kv.cuda_ipc import CudaIpcTransport
from slipstream.kv.device import DeviceBlocks, DeviceSegment
from slipstream.kv.digest import block_digests
from slipstream.kv.nixl import NixlTransport
from slipstream.kv.nixl_agent import NixlAgent
from slipstream.kv.offers import Pool, offer
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import TransferError, read_now

WAIT_S = 20.0
SIZE = 4096


def drawn(count: int, seed: int, size: int = SIZE) -> Blocks:
    return np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)


@pytest.mark.parametrize("staging_bytes", [1, 3 * SIZE, 1 << 20])
def test_what_goes_in_comes_out(monkeypatch: pytest.MonkeyPatch, staging_bytes: int) -> None:
    monkeypatch.setattr(device_module, "STAGING_BYTES", staging_bytes)
    memory, source = drawn(12, 1), drawn(9, 2)
    pool = on_device(memory)
    rows = [3, 0, 11, 7, 8]
    made = pool.store(source, [8, 1, 1, 0, 4], rows, digest=True)
    assert made == block_digests(source, [8, 1, 1, 0, 4]) == block_digests(pool, rows)
    assert (pool.load(rows) == source[[8, 1, 1, 0, 4]]).all()
    untouched = [row for row in range(12) if row not in rows]
    assert (pool.load(untouched) == drawn(12, 1)[untouched]).all()
    assert pool.store(source, [2], [5], digest=False) == ()
    for wrong in (-1, 12):
        for call in (pool.load, pool.digests, lambda x: pool.store(source, [0], x, True)):
            with pytest.raises(IndexError):
                call([wrong])


def bus(path: Path, name: str, blocks: Blocks | DeviceBlocks) -> BusTransport:
    return BusTransport(blocks, 7, f"ipc://{path}/{name}.sock")


@pytest.mark.parametrize("theirs_on_gpu", [False, True])
@pytest.mark.parametrize("ours_on_gpu", [False, True])
def test_the_bus_reads_any_pool_into_any_other(
    tmp_path: Path, make_segment: MakeSegment, theirs_on_gpu: bool, ours_on_gpu: bool
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    there = on_device(source.blocks) if theirs_on_gpu else source.blocks
    here = on_device(ours.blocks) if ours_on_gpu else ours.blocks
    theirs, transport = bus(tmp_path, "p", there), bus(tmp_path, "d", here)
    peer = node_of(source, {"bus": theirs.advertise()})
    transport.connect(peer)
    expected = ours.blocks.copy()
    expected[[2, 0, 7]] = source.blocks[[5, 5, 1]]
    read = read_now(transport, peer, [5, 5, 1], here, [2, 0, 7], WAIT_S)
    assert read == block_digests(source.blocks, [5, 5, 1])
    assert (ours.blocks == expected).all()
    transport.close()
    theirs.close()


@pytest.mark.parametrize("kind", ["bus", "nixl"])
def test_a_device_that_fails_ends_its_read_alone(
    tmp_path: Path, make_segment: MakeSegment, kind: str
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    driver = FakeDriver()
    here, whole = on_device(ours.blocks, driver), on_device(ours.blocks)
    match kind:
        case "bus":
            theirs, transport = (bus(tmp_path, x, source.blocks) for x in "pd")
        case _:
            agents = (NixlAgent("p@7"), NixlAgent("d@7"))
            theirs, transport = (NixlTransport(agent, source.blocks) for agent in agents)
    peer = node_of(source, {kind: theirs.advertise()})
    transport.connect(peer)
    driver.fails = "an illegal address"
    with pytest.raises(TransferError, match="device: an illegal address"):
        read_now(transport, peer, [5, 4], here, [2, 0], WAIT_S)
    read = read_now(transport, peer, [5, 4], whole, [2, 0], WAIT_S)
    assert read == block_digests(source.blocks, [5, 4]) == block_digests(ours.blocks, [2, 0])
    transport.close()
    theirs.close()


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), unique_by=lambda pair: pair[1]),
    st.integers(0, 100),
)
def test_blocks_that_follow_each_other_are_one_copy(
    pairs: list[tuple[int, int]], seed: int
) -> None:
    """However they lie: everything where it belongs, and not a call too many."""
    source, ours = drawn(12, seed, 300), drawn(12, seed + 1, 300)
    driver = FakeDriver()
    theirs = CudaIpcTransport(FakeDriver(), on_device(source), "here")
    here = on_device(ours, driver)
    transport = CudaIpcTransport(driver, here, "here")
    words = header(block_bytes=300)
    peer = node_of(
        DeviceSegment(words, on_device(source), here, ""), {"cuda_ipc": theirs.advertise()}
    )
    transport.connect(peer)
    expected = ours.copy()
    for a, b in pairs:
        expected[b] = source[a]
    runs = sum(
        index == 0 or pairs[index - 1] != (a - 1, b - 1) for index, (a, b) in enumerate(pairs)
    )
    driver.copies_left = runs
    read_now(transport, peer, [a for a, _ in pairs], here, [b for _, b in pairs], WAIT_S, False)
    assert driver.copies_left == 0
    assert (ours == expected).all()


def test_a_pool_on_a_gpu_is_offered_by_what_can_reach_it(tmp_path: Path) -> None:
    """No GPU here: `cuda_ipc` says so, and `shm` that there is nothing to map."""
    blocks = on_device(drawn(12, 1))
    segment = DeviceSegment(header(), blocks, blocks, "")
    bind = f"ipc://{tmp_path}/p.sock"
    offers = offer("auto", Pool(segment, "p", bind, bind))
    for made in offers.transports:
        made.close()
    assert offers.absent["shm"] == "the pool is in a GPU's memory"
    assert "CUDA" in offers.absent["cuda_ipc"]
    assert "bus" in [made.name for made in offers.transports]


def test_tiers_below_a_pool_on_a_gpu() -> None:
    memory = drawn(6, 1)
    kept = memory.copy()
    offload = Offload(on_device(memory), "x", folder=None, host_bytes=8 * SIZE, disk_bytes=0)
    events: list[object] = []
    over = threading.Semaphore(0)

    def post(event: object) -> None:
        if isinstance(event, BlocksSaved | PullDone):
            events.append(event)
            over.release()

    offload.start(post)
    hashes = [bytes([i]) * 16 for i in range(3)]
    saved = [SavedBlock(block, hashes[i], i, None) for i, block in enumerate((4, 0, 5))]
    offload.execute(SaveBlocks("s", tuple(saved)))
    assert over.acquire(timeout=WAIT_S)
    memory[:] = 0
    offload.execute(LoadBlocks("l", tuple(hashes), (1, 2, 3)))
    assert over.acquire(timeout=WAIT_S)
    offload.close()
    assert (memory[1:4] == kept[[4, 0, 5]]).all() and not memory[[0, 4, 5]].any()
    done = events[1]
    assert isinstance(done, PullDone) and done.digests == block_digests(kept, [4, 0, 5])


def test_gpus_are_counted_without_a_driver(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia7", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert count_gpus({}, tmp_path) == 3
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "1,7"}, tmp_path) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path / "none") == 0


def test_a_device_that_is_lost_is_not_asked_again() -> None:
    driver = FakeDriver()
    pool = on_device(drawn(4, 1), driver)
    driver.fails = "an illegal address"
    with pytest.raises(CudaError):
        pool.load([1])
    driver.fails, driver.queued = "", []
    with pytest.raises(CudaError, match="an illegal address"):
        pool.digests([1])
    assert not driver.queued
    assert DEVICE_STEP > 1 << 47


class HostKernels:
    """What a GPU's kernels do, done to memory that stands for its."""

    copies = 0

    def copy(
        self,
        source: int,
        count: int,
        source_rows: list[int],
        into: DeviceBlocks,
        rows: list[int],
        digest: bool,
    ) -> tuple[bytes, ...]:
        self.copies += 1
        theirs, ours = memory_at(source, count, into.shape[1]), memory_at(into.pointer, *into.shape)
        ours[rows] = theirs[source_rows]
        return self.digests(into, rows) if digest else ()

    def digests(self, blocks: DeviceBlocks, rows: list[int]) -> tuple[bytes, ...]:
        return block_digests(memory_at(blocks.pointer, *blocks.shape), rows)


def memory_at(pointer: int, count: int, size: int) -> Blocks:
    memory = (ctypes.c_uint8 * (count * size)).from_address(pointer % DEVICE_STEP)
    return np.ctypeslib.as_array(memory).reshape(count, size)


@pytest.mark.parametrize("near", [True, False])
def test_kernels_copy_what_they_reach_and_digest_what_is_here(near: bool) -> None:
    """Of a peer on another card the driver copies; digests are made here in any case."""
    source, ours = drawn(12, 1), drawn(12, 2)
    driver, kernels = FakeDriver(), HostKernels()
    driver.gpu = 0 if near else 1
    here = on_device(ours, driver, kernels)
    theirs = CudaIpcTransport(FakeDriver(), on_device(source), "here")
    transport = CudaIpcTransport(driver, here, "here")
    there = DeviceSegment(header(), on_device(source), here, "")
    peer = node_of(there, {"cuda_ipc": theirs.advertise()})
    transport.connect(peer)
    driver.copies_left = 0 if near else 2
    read = read_now(transport, peer, [5, 6, 1], here, [2, 3, 7], WAIT_S)
    assert read == block_digests(source, [5, 6, 1]) == block_digests(here, [2, 3, 7])
    assert (ours[[2, 3, 7]] == source[[5, 6, 1]]).all()
    assert kernels.copies == near and driver.copies_left == 0
