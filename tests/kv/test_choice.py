"""Which transport serves which peer: what is common, leads there and was measured fastest."""

import logging
import time

import msgspec
import numpy as np
import pytest

from kv.conftest import LAYOUT, MakeSegment, MakeTransport, node_of
from slipstream.kv import choice as choice_module
from slipstream.kv.choice import CLEARLY, Transports
from slipstream.kv.segment import Segment
from slipstream.kv.transport import Read, TransferError, Transport, read_now
from slipstream.messages import NodeInfo

WAIT_S = 20.0


def choice(
    make_transport: MakeTransport, ours: Segment, order: tuple[str, ...] = ("shm", "ipc")
) -> Transports:
    return Transports([make_transport(kind, ours, "d") for kind in order], LAYOUT, 4096, "here")


def test_shared_memory_is_chosen_where_it_leads_there(
    make_transport: MakeTransport, make_segment: MakeSegment, caplog: pytest.LogCaptureFixture
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    offered = {"bus": make_transport("ipc", source, "p").advertise(), "shm": str(source.path)}
    chosen = choice(make_transport, ours)
    assert set(chosen.advertise()) == {"shm", "bus"}
    assert chosen.choose(node_of(source, offered)).name == "shm"
    assert chosen.choose(node_of(source, {"bus": offered["bus"]}, "prefill-1")).name == "bus"
    assert choice(make_transport, ours, ("tcp",)).choose(node_of(source, offered)).name == "bus"
    assert "SLOW" not in caplog.text


def test_a_segment_that_cannot_be_mapped_is_a_loud_detour_said_once(
    make_transport: MakeTransport, make_segment: MakeSegment, caplog: pytest.LogCaptureFixture
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    offered = {"bus": make_transport("ipc", source, "p").advertise(), "shm": f"{source.path}x"}
    chosen = choice(make_transport, ours)
    for _ in range(3):
        peer = node_of(source, offered)
        read_now(chosen.choose(peer), peer, [1], ours.blocks, [1], WAIT_S)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "SLOW: no shm from prefill-0" in warnings[0].message
    assert (ours.blocks[1] == source.blocks[1]).all()
    chosen.choose(node_of(source, offered, "prefill-1", host="elsewhere"))
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_new_epoch_is_looked_at_anew(
    make_transport: MakeTransport, make_segment: MakeSegment
) -> None:
    old, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    chosen = choice(make_transport, ours)
    assert chosen.choose(node_of(old, {"shm": str(old.path)})).name == "shm"
    new = make_segment("prefill-0", fill=5, epoch=8)
    peer = node_of(new, {"shm": str(new.path)})
    read_now(chosen.choose(peer), peer, [1], ours.blocks, [1], WAIT_S)
    assert (ours.blocks[1] == new.blocks[1]).all()
    assert chosen.peers == {"prefill-0": 8}
    chosen.forget("prefill-0")
    assert chosen.peers == {}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"kv_layout_id": "other"}, "layout"),
        ({"block_bytes": 8192}, "layout"),
        ({"transports": {"nixl": "x"}}, "transport"),
        ({"transports": {"bus": "nonsense"}}, "transport"),
    ],
)
def test_a_peer_that_nothing_leads_to(
    make_transport: MakeTransport, make_segment: MakeSegment, change: dict[str, object], cause: str
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    peer = node_of(source, {"shm": str(source.path)})
    assert peer.worker is not None
    worker = msgspec.structs.replace(peer.worker, **change)
    with pytest.raises(TransferError) as raised:
        choice(make_transport, ours).choose(msgspec.structs.replace(peer, worker=worker))
    assert raised.value.cause == cause


class Paced:
    """READs take as long as they are told to; `None`: they fail."""

    def __init__(self, name: str, seconds: float | None):
        self.name, self.seconds = name, seconds
        self.connected: list[str] = []

    def advertise(self) -> str:
        return "here"

    def connect(self, peer: NodeInfo) -> None:
        self.connected.append(peer.node_id)

    def read(self, read: Read) -> None:
        if self.seconds is None:
            read.done(TransferError("timeout"))
            return
        time.sleep(self.seconds)
        read.done(tuple(b"" for _ in read.source_blocks))

    def forget(self, node_id: str) -> None:
        pass

    def close(self) -> None:
        pass


class Broken(Paced):
    """Raises what no transport should: at once, or in its READs."""

    def connect(self, peer: NodeInfo) -> None:
        if self.seconds is None:
            raise ValueError("nobody foresaw this")

    def read(self, read: Read) -> None:
        raise ValueError("nobody foresaw this")


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_a_transport_that_breaks_is_passed_over(
    make_segment: MakeSegment, caplog: pytest.LogCaptureFixture, seconds: float | None
) -> None:
    made: list[Transport] = [Broken("shm", seconds), Paced("bus", 0.001)]
    peer = node_of(make_segment("prefill-0"), {"shm": "there", "bus": "there"})
    chosen = Transports(made, LAYOUT, 4096, "here")
    if seconds is None:
        assert chosen.choose(peer).name == "bus"
    chosen.measure(peer)
    assert not chosen.due(peer, float("inf")) and chosen.choose(peer).name == "bus"
    assert any(record.exc_info for record in caplog.records)


def paced(make_segment: MakeSegment, **seconds: float | None) -> tuple[Transports, NodeInfo]:
    made: list[Transport] = [Paced(name, value) for name, value in seconds.items()]
    peer = node_of(make_segment("prefill-0"), dict.fromkeys(seconds, "there"))
    return Transports(made, LAYOUT, 4096, "here", {"cuda_ipc": "no such device"}), peer


def test_the_fastest_is_taken_and_all_rates_are_told(
    make_segment: MakeSegment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    chosen, peer = paced(make_segment, shm=0.05, nixl=0.001, bus=0.05)
    assert chosen.due(peer, 0.0)
    assert chosen.choose(peer).name == "shm"  # before it is measured: the first
    chosen.measure(peer)
    assert not chosen.due(peer, float("inf"))
    assert chosen.choose(peer).name == "nixl"
    said = chosen.statistics()
    assert said["transfer_nixl_gbps"] > CLEARLY * said["transfer_shm_gbps"] > 0
    assert (said["transfer_nixl_peers"], said["transfer_shm_peers"]) == (1, 0)
    assert any("come by nixl" in r.message and "shm 0." in r.message for r in caplog.records)


def test_a_slower_one_earlier_in_the_order_is_not_left_for_a_little(
    make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, peer = paced(make_segment, shm=0.0, nixl=0.0, bus=0.0)
    rates = {"shm": 10.0, "nixl": 10.0 * CLEARLY, "bus": 1.0}
    monkeypatch.setattr(chosen, "_rate", lambda transport, _: rates[transport.name])
    chosen.measure(peer)
    assert chosen.choose(peer).name == "shm"


def test_one_that_fails_its_measure_is_loud_and_not_taken(
    make_segment: MakeSegment, caplog: pytest.LogCaptureFixture
) -> None:
    chosen, peer = paced(make_segment, shm=None, bus=0.0)
    chosen.measure(peer)
    chosen.measure(peer)
    assert chosen.choose(peer).name == "bus"
    loud = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert loud == ["SLOW: no shm from prefill-0: timeout"]


def test_a_peer_that_nothing_measures_is_tried_again_ever_more_seldom(
    make_segment: MakeSegment,
) -> None:
    chosen, peer = paced(make_segment, shm=None)
    pauses_s = []
    for _ in range(3):
        chosen.measure(peer)
        now_s = time.monotonic()
        assert not chosen.due(peer, now_s)
        pauses_s.append(next(t for t in (1.0, 2.0, 4.0, 8.0) if chosen.due(peer, now_s + t)))
    assert pauses_s == [1.0, 2.0, 4.0]
    assert chosen.choose(peer).name == "shm"  # it may still work


def test_after_a_failed_read_another_serves_until_it_is_measured_anew(
    make_segment: MakeSegment,
) -> None:
    chosen, peer = paced(make_segment, shm=0.0, bus=0.01)
    chosen.measure(peer)
    shm = chosen.choose(peer)
    chosen.failed(peer, shm, "range")  # says nothing about the transport
    assert chosen.choose(peer) is shm
    chosen.failed(peer, shm, "timeout")
    assert chosen.choose(peer).name == "bus"
    assert chosen.due(peer, time.monotonic() + choice_module.RETRY_FIRST_S)
    chosen.measure(peer)
    assert chosen.choose(peer) is shm


def test_we_do_not_measure_ourselves(make_segment: MakeSegment) -> None:
    chosen, peer = paced(make_segment, shm=0.0)
    assert peer.worker is not None
    ours = msgspec.structs.replace(peer.worker, transports=chosen.advertise())
    assert not chosen.due(msgspec.structs.replace(peer, worker=ours), 0.0)
    assert not chosen.due(msgspec.structs.replace(peer, worker=None), 0.0)


def test_measuring_writes_into_nobodys_blocks(
    make_transport: MakeTransport, make_segment: MakeSegment
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    kinds = ("shm", "nixl", "ipc")
    theirs = [make_transport(kind, source, "p") for kind in kinds]
    chosen = choice(make_transport, ours, kinds)
    before = (source.blocks.copy(), ours.blocks.copy())
    chosen.measure(node_of(source, {one.name: one.advertise() for one in theirs}))
    assert {n for n in chosen.statistics() if "gbps" in n} == {
        f"transfer_{name}_gbps" for name in ("shm", "nixl", "bus")
    }
    assert np.array_equal(before, (source.blocks, ours.blocks))
