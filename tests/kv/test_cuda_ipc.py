"""What `cuda_ipc` does about handles, epochs and errors, on a device whose memory is the host's."""

import queue
import time

import msgspec
import numpy as np
import pytest

from kv.conftest import MakeSegment, node_of
from kv.fake_gpu import FakeDriver, on_device
from slipstream.kv import cuda_driver, device
from slipstream.kv.cuda_driver import CudaDriver, CudaError
from slipstream.kv.cuda_ipc import CudaIpcTransport
from slipstream.kv.device import DeviceBlocks
from slipstream.kv.digest import block_digests
from slipstream.kv.segment import Blocks
from slipstream.kv.transport import Digests, Read, TransferError, read_now
from slipstream.messages import NodeInfo

WAIT_S = 20.0


def on_gpu(blocks: Blocks) -> tuple[FakeDriver, CudaIpcTransport, DeviceBlocks]:
    """The pool's bytes as a device's."""
    driver = FakeDriver()
    pool = on_device(blocks, driver)
    return driver, CudaIpcTransport(driver, pool, "here"), pool


@pytest.mark.parametrize("staging_bytes", [1, 3 * 4096, 1 << 20])
def test_blocks_go_from_device_to_device_and_to_the_host(
    make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch, staging_bytes: int
) -> None:
    monkeypatch.setattr(device, "STAGING_BYTES", staging_bytes)
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    _, theirs, _ = on_gpu(source.blocks)
    _, transport, name = on_gpu(ours.blocks)
    peer = node_of(source, {"cuda_ipc": theirs.advertise()})
    transport.connect(peer)
    expected = ours.blocks.copy()
    expected[[2, 0, 7, 9]] = source.blocks[[5, 5, 1, 11]]
    read = read_now(transport, peer, [5, 5, 1, 11], name, [2, 0, 7, 9], WAIT_S)
    assert read == block_digests(source.blocks, [5, 5, 1, 11])
    assert (ours.blocks == expected).all()
    host = np.zeros((2, 4096), np.uint8)
    read = read_now(transport, peer, [4, 3], host, [1, 0], WAIT_S)
    assert read == block_digests(source.blocks, [4, 3])
    assert (host == source.blocks[[3, 4]]).all()
    assert read_now(transport, peer, [4], host, [0], WAIT_S, verify=False) == ()


def test_a_handle_is_opened_once_a_life_and_shut_at_its_end(make_segment: MakeSegment) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    _, theirs, _ = on_gpu(source.blocks)
    driver, transport, name = on_gpu(ours.blocks)
    peer = node_of(source, {"cuda_ipc": theirs.advertise()})
    transport.connect(peer)
    transport.connect(peer)
    assert len(driver.opened) == 1
    later = msgspec.structs.replace(peer, epoch=8)
    with pytest.raises(TransferError, match="epoch"):
        read_now(transport, later, [1], name, [1], WAIT_S)
    transport.connect(later)
    with pytest.raises(TransferError, match="epoch"):
        read_now(transport, peer, [1], name, [1], WAIT_S)
    assert len(driver.opened) == 1
    transport.forget(peer.node_id)
    assert not driver.opened
    transport.connect(later)
    transport.close()
    assert not driver.opened
    with pytest.raises(TransferError, match="closed"):
        transport.connect(later)


@pytest.mark.parametrize(("asked", "local"), [([12], [0]), ([-1], [0]), ([0], [12])])
def test_blocks_that_nobody_has(
    make_segment: MakeSegment, asked: list[int], local: list[int]
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    _, theirs, _ = on_gpu(source.blocks)
    driver, transport, name = on_gpu(ours.blocks)
    peer = node_of(source, {"cuda_ipc": theirs.advertise()})
    transport.connect(peer)
    with pytest.raises(TransferError, match="range"):
        read_now(transport, peer, asked, name, local, WAIT_S)
    assert not driver.queued


def test_a_handle_that_leads_elsewhere_is_not_used(make_segment: MakeSegment) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    their_driver, theirs, _ = on_gpu(source.blocks)
    driver, transport, _ = on_gpu(ours.blocks)
    peer = node_of(source, {"cuda_ipc": theirs.advertise()})
    their_driver.cards[0][3] ^= 1
    with pytest.raises(TransferError, match="other memory"):
        transport.connect(peer)
    assert not driver.opened


@pytest.mark.parametrize("told", ["", "§", "AAAA"])
def test_an_address_that_is_none(make_segment: MakeSegment, told: str) -> None:
    _, transport, _ = on_gpu(make_segment("decode-0").blocks)
    with pytest.raises(TransferError) as raised:
        transport.connect(node_of(make_segment("prefill-0"), {"cuda_ipc": told}))
    assert raised.value.cause == "attach"


def test_another_host_is_not_tried(make_segment: MakeSegment) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    theirs = CudaIpcTransport(FakeDriver(), on_device(source.blocks), "there")
    driver, transport, _ = on_gpu(ours.blocks)
    with pytest.raises(TransferError, match="another host"):
        transport.connect(node_of(source, {"cuda_ipc": theirs.advertise()}))
    assert not driver.opened


def test_what_the_device_refuses_is_said(make_segment: MakeSegment) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    _, theirs, _ = on_gpu(source.blocks)
    driver, transport, name = on_gpu(ours.blocks)
    peer: NodeInfo = node_of(source, {"cuda_ipc": theirs.advertise()})
    driver.fails = "no peer access"
    with pytest.raises(TransferError, match=r"attach: .*no peer access"):
        transport.connect(peer)
    driver.fails = ""
    transport.connect(peer)
    driver.fails = "an illegal address"
    results: queue.SimpleQueue[Digests | TransferError] = queue.SimpleQueue()
    transport.read(Read(peer, [1], name, [1], time.monotonic() + WAIT_S, results.put))
    assert str(results.get_nowait()) == "device: an illegal address"


@pytest.mark.parametrize("copies", range(9))
def test_nothing_is_copied_after_a_read_that_failed(make_segment: MakeSegment, copies: int) -> None:
    """Wherever the device refuses a copy: to the pool, or from there to be digested."""
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    _, theirs, _ = on_gpu(source.blocks)
    driver, transport, name = on_gpu(ours.blocks)
    peer = node_of(source, {"cuda_ipc": theirs.advertise()})
    transport.connect(peer)
    driver.copies_left = copies
    rows = [1, 3, 5, 7]  # those that follow each other are one copy
    if copies < 8:
        with pytest.raises(TransferError, match="device: an invalid argument"):
            read_now(transport, peer, rows, name, rows, WAIT_S)
    else:
        read_now(transport, peer, rows, name, rows, WAIT_S)
    assert not driver.queued
    driver.copies_left = 1 << 30
    assert read_now(transport, peer, rows, name, rows, WAIT_S) == block_digests(source.blocks, rows)


def test_a_device_that_cannot_say_when_it_is_at_rest_is_not_asked_again(
    make_segment: MakeSegment,
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    _, theirs, _ = on_gpu(source.blocks)
    driver, transport, name = on_gpu(ours.blocks)
    peer = node_of(source, {"cuda_ipc": theirs.advertise()})
    transport.connect(peer)
    driver.fails = "an illegal address"
    with pytest.raises(TransferError, match="device: an illegal address"):
        read_now(transport, peer, [1], name, [1], WAIT_S)
    driver.fails, driver.queued = "", []
    with pytest.raises(TransferError, match="device: is lost: an illegal address"):
        read_now(transport, peer, [1], name, [1], WAIT_S)
    with pytest.raises(TransferError, match="device: is lost: an illegal address"):
        transport.connect(msgspec.structs.replace(peer, epoch=8))
    assert not driver.queued


def test_without_a_gpu_the_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_NAMES", ("no-such-library.so",))
    with pytest.raises(CudaError, match="libcudart"):
        CudaDriver()
