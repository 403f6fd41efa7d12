"""READs over both transports, with peers that are gone, hang, lie or have begun anew."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv.conftest import LAYOUT, MakeSegment, node_of
from slipstream.config import StartError
from slipstream.kv import bus
from slipstream.kv.bus import BusTransport, ReadReply, bus_address
from slipstream.kv.digest import block_digests
from slipstream.kv.segment import Segment
from slipstream.kv.shm import ShmTransport
from slipstream.kv.transport import TransferError, Transport, Transports
from slipstream.messages import NodeInfo

WAIT_S = 20.0
MakeTransport = Callable[..., Transport]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeTransport]:
    made: list[Transport] = []

    def build(kind: str, segment: Segment, name: str = "a") -> Transport:
        transport: Transport
        if kind == "shm":
            transport = ShmTransport(segment)
        else:
            listen = "tcp://127.0.0.1:1" if kind == "tcp" else "ipc:///x"
            transport = BusTransport(
                segment.blocks, segment.header.epoch, bus_address(listen, str(tmp_path), name)
            )
        made.append(transport)
        return transport

    yield build
    for transport in made:
        transport.close()


@pytest.fixture(params=["shm", "ipc", "tcp"])
def pair(
    request: pytest.FixtureRequest, make: MakeTransport, make_segment: MakeSegment
) -> tuple[Segment, Transport, NodeInfo, Segment]:
    """Source, our transport, the peer as we know it, our own segment."""
    source, ours = make_segment("prefill-0", num_blocks=40), make_segment("decode-0", fill=2)
    theirs = make(request.param, source, "p")
    transport = make(request.param, ours, "d")
    peer = node_of(source, {theirs.name: theirs.advertise()})
    transport.connect(peer)
    return source, transport, peer, ours


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_exactly_the_asked_blocks_arrive(
    pair: tuple[Segment, Transport, NodeInfo, Segment],
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    source, transport, peer, ours = pair
    # Everywhere from a part for each block to one part for all.
    monkeypatch.setattr(bus, "REPLY_BYTES", data.draw(st.integers(1, 60_000)))
    local = data.draw(st.lists(st.integers(0, 11), unique=True, max_size=12))
    asked = data.draw(st.lists(st.integers(0, 39), min_size=len(local), max_size=len(local)))
    expected = ours.blocks.copy()
    expected[local] = source.blocks[asked]
    transport.read(peer, asked, local, WAIT_S)
    assert (ours.blocks == expected).all()
    assert block_digests(ours.blocks, local) == block_digests(source.blocks, asked)


@pytest.mark.parametrize("asked", [[40], [-1], [0, 1 << 40]])
def test_blocks_that_the_peer_does_not_have(
    pair: tuple[Segment, Transport, NodeInfo, Segment], asked: list[int]
) -> None:
    _, transport, peer, ours = pair
    before = ours.blocks.copy()
    with pytest.raises(TransferError) as raised:
        transport.read(peer, asked, list(range(len(asked))), WAIT_S)
    assert raised.value.cause == "range"
    assert (ours.blocks == before).all()
    transport.read(peer, [5], [0], WAIT_S)


def test_another_epoch_is_refused(pair: tuple[Segment, Transport, NodeInfo, Segment]) -> None:
    _, transport, peer, _ = pair
    with pytest.raises(TransferError) as raised:
        transport.read(msgspec.structs.replace(peer, epoch=8), [1], [1], WAIT_S)
    assert raised.value.cause == "epoch"


def test_two_readers_at_a_time(pair: tuple[Segment, Transport, NodeInfo, Segment]) -> None:
    source, transport, peer, ours = pair

    def read(local: list[int]) -> None:
        for _ in range(50):
            transport.read(peer, local, local, WAIT_S)

    threads = [threading.Thread(target=read, args=([2 * k, 2 * k + 1],)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert (ours.blocks == source.blocks[:12]).all()


def test_a_reader_outlives_forget(pair: tuple[Segment, Transport, NodeInfo, Segment]) -> None:
    source, transport, peer, ours = pair
    transport.read(peer, [7], [0], WAIT_S)
    transport.forget(peer.node_id)
    transport.connect(peer)
    transport.read(peer, [8], [0], WAIT_S)
    assert (ours.blocks[0] == source.blocks[8]).all()


class Impostor:
    """Takes questions on a socket and answers as it is told, or not at all."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def answer(self, make: Callable[[bus.ReadRequest], list[bytes]]) -> None:
        sender, payload = self.socket.recv_multipart()
        self.socket.send_multipart(
            [sender, *make(msgspec.msgpack.decode(payload, type=bus.ReadRequest))]
        )

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def impostor() -> Iterator[Impostor]:
    made = Impostor()
    yield made
    made.close()


def test_a_silent_peer_ends_at_the_deadline_and_comes_too_late(
    impostor: Impostor, make: MakeTransport, make_segment: MakeSegment
) -> None:
    ours = make_segment("decode-0")
    transport = make("ipc", ours, "d")
    peer = node_of(ours, {"bus": impostor.address})
    before = ours.blocks.copy()
    with pytest.raises(TransferError) as raised:
        transport.read(peer, [0], [1], 0.05)
    assert raised.value.cause == "timeout"
    # The late answer of the first READ, then a right one of the second.
    right = b"\x05" * 4096
    late = [impostor.socket.recv_multipart() for _ in range(1)]
    failed: list[BaseException] = []

    def read() -> None:
        try:
            transport.read(peer, [0], [2], WAIT_S)
        except TransferError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    request = msgspec.msgpack.decode(late[0][1], type=bus.ReadRequest)
    head = msgspec.msgpack.encode(ReadReply(request.read_id, 0, 7))
    impostor.socket.send_multipart([late[0][0], head, b"\xff" * 4096])
    impostor.answer(lambda r: [msgspec.msgpack.encode(ReadReply(r.read_id, r.part, 7)), right])
    reader.join(WAIT_S)
    assert not failed
    before[2] = 5
    assert (ours.blocks == before).all()


@pytest.mark.parametrize(
    ("cause", "lie"),
    [
        ("malformed", lambda r: [b"\xc1"]),
        ("malformed", lambda r: [msgspec.msgpack.encode(ReadReply(r.read_id + 1, r.part, 7)), b""]),
        ("malformed", lambda r: [msgspec.msgpack.encode(ReadReply(r.read_id, r.part + 1, 7)), b""]),
        ("epoch", lambda r: [msgspec.msgpack.encode(ReadReply(r.read_id, r.part, 8)), b"x" * 4096]),
        ("malformed", lambda r: [msgspec.msgpack.encode(ReadReply(r.read_id, r.part, 7))]),
        ("malformed", lambda r: [msgspec.msgpack.encode(ReadReply(r.read_id, r.part, 7)), b"x"]),
        ("range", lambda r: [msgspec.msgpack.encode(ReadReply(r.read_id, r.part, 7, "range"))]),
    ],
)
def test_a_wrong_answer_changes_nothing(
    impostor: Impostor,
    make: MakeTransport,
    make_segment: MakeSegment,
    cause: str,
    lie: Callable[[bus.ReadRequest], list[bytes]],
) -> None:
    ours = make_segment("decode-0")
    transport = make("ipc", ours, "d")
    before = ours.blocks.copy()
    answering = threading.Thread(target=impostor.answer, args=(lie,))
    answering.start()
    with pytest.raises(TransferError) as raised:
        transport.read(node_of(ours, {"bus": impostor.address}), [0], [1], WAIT_S)
    answering.join(WAIT_S)
    assert raised.value.cause == cause
    assert (ours.blocks == before).all()


def test_malformed_questions_are_counted_and_the_server_goes_on(
    make: MakeTransport, make_segment: MakeSegment
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    theirs, transport = make("tcp", source, "p"), make("tcp", ours, "d")
    assert isinstance(theirs, BusTransport)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rude = context.socket(zmq.DEALER)
    rude.setsockopt(zmq.LINGER, int(WAIT_S * 1000))
    rude.connect(theirs.advertise())
    drawn = np.random.default_rng(3)
    questions = [[drawn.bytes(int(drawn.integers(0, 200)))] for _ in range(200)]
    questions += [[], [b"a", b"b"], [msgspec.msgpack.encode([1, 2, 3])]]
    for question in questions:
        rude.send_multipart(question or [b""])
    too_many = msgspec.msgpack.encode(bus.ReadRequest(1, 0, 7, [0] * 5000))
    rude.send(too_many)
    _decoded = msgspec.msgpack.decode(rude.recv(), type=ReadReply)
    assert _decoded.error == "size"
    assert theirs.malformed == len(questions)
    rude.send(b"\x00" * (bus.REQUEST_BYTES_MAX + 1))  # ends that connection, nothing else
    rude.close(linger=0)
    context.term()
    transport.read(node_of(source, {"bus": theirs.advertise()}), [3], [4], WAIT_S)
    assert (ours.blocks[4] == source.blocks[3]).all()


def test_closing_ends_a_read_under_way(
    impostor: Impostor, make: MakeTransport, make_segment: MakeSegment
) -> None:
    ours = make_segment("decode-0")
    transport = make("ipc", ours, "d")
    causes: list[str] = []

    def read() -> None:
        try:
            transport.read(node_of(ours, {"bus": impostor.address}), [0], [1], 60.0)
        except TransferError as error:
            causes.append(error.cause)

    reader = threading.Thread(target=read)
    reader.start()
    impostor.socket.recv_multipart()
    transport.close()
    reader.join(WAIT_S)
    assert causes == ["closed"]
    with pytest.raises(TransferError):
        transport.read(node_of(ours, {"bus": impostor.address}), [0], [1], 60.0)


def test_a_living_socket_is_not_taken_over(
    make: MakeTransport, make_segment: MakeSegment, tmp_path: Path
) -> None:
    ours = make_segment()
    first = make("ipc", ours, "x")
    with pytest.raises(StartError, match="in use"):
        make("ipc", ours, "x")
    path = Path(first.advertise().removeprefix("ipc://"))
    assert path.stat().st_mode & 0o777 == 0o600
    first.close()
    assert not path.exists()
    path.touch()  # as a killed process leaves it
    make("ipc", ours, "x")


def test_addresses() -> None:
    assert bus_address("ipc:///a/n.sock", "/run/x", "n") == "ipc:///run/x/n.kv.sock"
    assert bus_address("tcp://0.0.0.0:5000", "/run/x", "n") == "tcp://0.0.0.0:*"
    with pytest.raises(StartError, match="too long"):
        bus_address("ipc:///a/n.sock", "/run/" + "x" * 100, "n")


def test_a_wildcard_is_advertised_as_the_control_address_is(make_segment: MakeSegment) -> None:
    transport = BusTransport(make_segment().blocks, 7, "tcp://0.0.0.0:*", "tcp://node-a:5000")
    host, _, port = transport.advertise().rpartition(":")
    assert host == "tcp://node-a"
    assert port not in ("*", "5000")
    transport.close()


def choice(
    make: MakeTransport, ours: Segment, order: tuple[str, ...] = ("shm", "ipc")
) -> Transports:
    return Transports([make(kind, ours, "d") for kind in order], LAYOUT, 4096, "here")


def test_shared_memory_is_chosen_where_it_leads_there(
    make: MakeTransport, make_segment: MakeSegment, caplog: pytest.LogCaptureFixture
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    offered = {"bus": make("ipc", source, "p").advertise(), "shm": str(source.path)}
    chosen = choice(make, ours)
    assert set(chosen.advertise()) == {"shm", "bus"}
    assert chosen.choose(node_of(source, offered)).name == "shm"
    assert chosen.choose(node_of(source, {"bus": offered["bus"]}, "prefill-1")).name == "bus"
    assert choice(make, ours, ("tcp",)).choose(node_of(source, offered)).name == "bus"
    assert "SLOW" not in caplog.text


def test_a_segment_that_cannot_be_mapped_is_a_loud_detour_said_once(
    make: MakeTransport, make_segment: MakeSegment, caplog: pytest.LogCaptureFixture
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    offered = {"bus": make("ipc", source, "p").advertise(), "shm": f"{source.path}x"}
    chosen = choice(make, ours)
    for _ in range(3):
        peer = node_of(source, offered)
        chosen.choose(peer).read(peer, [1], [1], WAIT_S)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "SLOW: no shm from prefill-0" in warnings[0].message
    assert (ours.blocks[1] == source.blocks[1]).all()
    chosen.choose(node_of(source, offered, "prefill-1", host="elsewhere"))
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_new_epoch_is_looked_at_anew(make: MakeTransport, make_segment: MakeSegment) -> None:
    old, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    chosen = choice(make, ours)
    assert chosen.choose(node_of(old, {"shm": str(old.path)})).name == "shm"
    new = make_segment("prefill-0", fill=5, epoch=8)
    peer = node_of(new, {"shm": str(new.path)})
    chosen.choose(peer).read(peer, [1], [1], WAIT_S)
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
    make: MakeTransport, make_segment: MakeSegment, change: dict[str, object], cause: str
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    peer = node_of(source, {"shm": str(source.path)})
    assert peer.worker is not None
    worker = msgspec.structs.replace(peer.worker, **change)
    with pytest.raises(TransferError) as raised:
        choice(make, ours).choose(msgspec.structs.replace(peer, worker=worker))
    assert raised.value.cause == cause
