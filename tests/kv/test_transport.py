"""READs over all transports, with peers that are gone, hang, lie or have begun anew."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv.conftest import MakeSegment, MakeTransport, Pair, node_of
from slipstream.config import StartError
from slipstream.kv import bus_wire
from slipstream.kv.bus import BusTransport, bus_address
from slipstream.kv.bus_reader import READS_PER_PEER
from slipstream.kv.bus_wire import REQUEST_BYTES_MAX, ReadReply, ReadRequest
from slipstream.kv.digest import block_digests
from slipstream.kv.transport import Digests, Read, TransferError, read_now

WAIT_S = 20.0


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_exactly_the_asked_blocks_arrive(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    source, transport, peer, ours = pair
    # Everywhere from a part for each block to one part for all.
    monkeypatch.setattr(bus_wire, "REPLY_BYTES", data.draw(st.integers(1, 60_000)))
    local = data.draw(st.lists(st.integers(0, 11), unique=True, max_size=12))
    asked = data.draw(st.lists(st.integers(0, 39), min_size=len(local), max_size=len(local)))
    expected = ours.blocks.copy()
    expected[local] = source.blocks[asked]
    digests = read_now(transport, peer, asked, ours.blocks, local, WAIT_S)
    assert (ours.blocks == expected).all()
    assert digests == block_digests(source.blocks, asked)
    ours.blocks[local] = 0
    assert read_now(transport, peer, asked, ours.blocks, local, WAIT_S, verify=False) == ()
    assert (ours.blocks == expected).all()


@pytest.mark.parametrize("asked", [[40], [-1], [0, 1 << 40]])
def test_blocks_that_the_peer_does_not_have(pair: Pair, asked: list[int]) -> None:
    _, transport, peer, ours = pair
    before = ours.blocks.copy()
    with pytest.raises(TransferError) as raised:
        read_now(transport, peer, asked, ours.blocks, range(len(asked)), WAIT_S)
    assert raised.value.cause == "range"
    assert (ours.blocks == before).all()
    read_now(transport, peer, [5], ours.blocks, [0], WAIT_S)


def test_another_epoch_is_refused(pair: Pair) -> None:
    _, transport, peer, ours = pair
    with pytest.raises(TransferError) as raised:
        other = msgspec.structs.replace(peer, epoch=8)
        read_now(transport, other, [1], ours.blocks, [1], WAIT_S)
    assert raised.value.cause == "epoch"


def test_two_readers_at_a_time(pair: Pair) -> None:
    source, transport, peer, ours = pair

    def read(local: list[int]) -> None:
        for _ in range(50):
            read_now(transport, peer, local, ours.blocks, local, WAIT_S)

    threads = [threading.Thread(target=read, args=([2 * k, 2 * k + 1],)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert (ours.blocks == source.blocks[:12]).all()


def test_a_reader_outlives_forget(pair: Pair) -> None:
    source, transport, peer, ours = pair
    read_now(transport, peer, [7], ours.blocks, [0], WAIT_S)
    transport.forget(peer.node_id)
    transport.connect(peer)
    read_now(transport, peer, [8], ours.blocks, [0], WAIT_S)
    assert (ours.blocks[0] == source.blocks[8]).all()


class Impostor:
    """Takes questions on a socket and answers as it is told, or not at all."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def answer(self, make: Callable[[ReadRequest], list[bytes]]) -> None:
        sender, payload = self.socket.recv_multipart()
        self.socket.send_multipart(
            [sender, *make(msgspec.msgpack.decode(payload, type=ReadRequest))]
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
    impostor: Impostor, make_transport: MakeTransport, make_segment: MakeSegment
) -> None:
    ours = make_segment("decode-0")
    transport = make_transport("ipc", ours, "d")
    peer = node_of(ours, {"bus": impostor.address})
    before = ours.blocks.copy()
    with pytest.raises(TransferError) as raised:
        read_now(transport, peer, [0], ours.blocks, [1], 0.05)
    assert raised.value.cause == "timeout"
    # The late answer of the first READ, then a right one of the second.
    right = b"\x05" * 4096
    late = [impostor.socket.recv_multipart() for _ in range(1)]
    failed: list[BaseException] = []

    def read() -> None:
        try:
            read_now(transport, peer, [0], ours.blocks, [2], WAIT_S)
        except TransferError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    request = msgspec.msgpack.decode(late[0][1], type=ReadRequest)
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
        ("malformed", lambda r: [msgspec.msgpack.encode([r.read_id, r.part, 7, "no such cause"])]),
        ("malformed", lambda r: [b"\x94\x01\x00\x07\xa1\xff"]),
        ("malformed", lambda r: [b"\x91" * 100_000]),
    ],
)
def test_a_wrong_answer_changes_nothing(
    impostor: Impostor,
    make_transport: MakeTransport,
    make_segment: MakeSegment,
    cause: str,
    lie: Callable[[ReadRequest], list[bytes]],
) -> None:
    ours = make_segment("decode-0")
    transport = make_transport("ipc", ours, "d")
    before = ours.blocks.copy()
    answering = threading.Thread(target=impostor.answer, args=(lie,))
    answering.start()
    with pytest.raises(TransferError) as raised:
        read_now(transport, node_of(ours, {"bus": impostor.address}), [0], ours.blocks, [1], WAIT_S)
    answering.join(WAIT_S)
    assert raised.value.cause == cause
    assert (ours.blocks == before).all()


def test_malformed_questions_are_counted_and_the_server_goes_on(
    make_transport: MakeTransport, make_segment: MakeSegment
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    theirs, transport = make_transport("tcp", source, "p"), make_transport("tcp", ours, "d")
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
    too_many = msgspec.msgpack.encode(ReadRequest(1, 0, 7, [0] * 5000))
    rude.send(too_many)
    _decoded = msgspec.msgpack.decode(rude.recv(), type=ReadReply)
    assert _decoded.error == "size"
    assert theirs.malformed == len(questions)
    rude.send(b"\x00" * (REQUEST_BYTES_MAX + 1))  # ends that connection, nothing else
    rude.close(linger=0)
    context.term()
    peer = node_of(source, {"bus": theirs.advertise()})
    read_now(transport, peer, [3], ours.blocks, [4], WAIT_S)
    assert (ours.blocks[4] == source.blocks[3]).all()


def test_closing_ends_a_read_under_way(
    impostor: Impostor, make_transport: MakeTransport, make_segment: MakeSegment
) -> None:
    ours = make_segment("decode-0")
    transport = make_transport("ipc", ours, "d")
    causes: list[str] = []

    def read() -> None:
        try:
            read_now(
                transport, node_of(ours, {"bus": impostor.address}), [0], ours.blocks, [1], 60.0
            )
        except TransferError as error:
            causes.append(error.cause)

    reader = threading.Thread(target=read)
    reader.start()
    impostor.socket.recv_multipart()
    transport.close()
    reader.join(WAIT_S)
    assert causes == ["closed"]
    with pytest.raises(TransferError, match="closed"):
        peer = node_of(ours, {"bus": impostor.address})
        read_now(transport, peer, [0], ours.blocks, [1], 60.0)


def test_a_living_socket_is_not_taken_over(
    make_transport: MakeTransport, make_segment: MakeSegment, tmp_path: Path
) -> None:
    ours = make_segment()
    first = make_transport("ipc", ours, "x")
    with pytest.raises(StartError, match="in use"):
        make_transport("ipc", ours, "x")
    path = Path(first.advertise().removeprefix("ipc://"))
    assert path.stat().st_mode & 0o777 == 0o600
    first.close()
    assert not path.exists()
    path.touch()  # as a killed process leaves it
    make_transport("ipc", ours, "x")


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


def test_a_peer_that_hangs_holds_up_nobody_else(
    impostor: Impostor, make_transport: MakeTransport, make_segment: MakeSegment
) -> None:
    """More READs from a silent peer than it may have at a time, then one from another."""
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    theirs, transport = make_transport("tcp", source, "p"), make_transport("tcp", ours, "d")
    results: queue.SimpleQueue[Digests | TransferError] = queue.SimpleQueue()
    silent, deadline_s = node_of(source, {"bus": impostor.address}, "prefill-1"), time.monotonic()
    for _ in range(3 * READS_PER_PEER):
        read = Read(silent, [0], ours.blocks, [1], deadline_s + WAIT_S, results.put)
        transport.read(read)
    peer = node_of(source, {"bus": theirs.advertise()})
    read_now(transport, peer, [3], ours.blocks, [4], WAIT_S)
    assert (ours.blocks[4] == source.blocks[3]).all()
    assert results.empty()
    transport.close()
    ended = [results.get(timeout=WAIT_S) for _ in range(3 * READS_PER_PEER)]
    assert {str(error) for error in ended} == {"closed"} and results.empty()


def test_those_that_wait_for_a_hanging_peer_have_their_deadlines_too(
    impostor: Impostor, make_transport: MakeTransport, make_segment: MakeSegment
) -> None:
    ours = make_segment("decode-0")
    transport = make_transport("ipc", ours, "d")
    silent = node_of(ours, {"bus": impostor.address})
    results: queue.SimpleQueue[Digests | TransferError] = queue.SimpleQueue()
    for number in range(2 * READS_PER_PEER):
        patience_s = 0.05 if number >= READS_PER_PEER else WAIT_S
        deadline_s = time.monotonic() + patience_s
        transport.read(Read(silent, [0], ours.blocks, [1], deadline_s, results.put))
    for _ in range(READS_PER_PEER):
        assert str(results.get(timeout=WAIT_S)) == f"timeout: {READS_PER_PEER} READs before it"
    assert results.empty()
