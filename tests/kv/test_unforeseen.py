"""Errors that nobody foresaw, on the threads of transports."""

import errno
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from kv.conftest import MakeSegment, MakeTransport, Pair, node_of
from slipstream.kv.bus import BusServer
from slipstream.kv.bus_reader import BusReads
from slipstream.kv.nixl_reads import NixlReads
from slipstream.kv.transport import Digests, Read, TransferError, read_now

WAIT_S = 20.0


@pytest.fixture(params=["bus", "nixl"])
def threaded(
    request: pytest.FixtureRequest, make_transport: MakeTransport, make_segment: MakeSegment
) -> Pair:
    """Source, a transport with a thread of its own, a connected peer, our segment."""
    kind = "ipc" if request.param == "bus" else "nixl"
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    theirs, transport = make_transport(kind, source, "p"), make_transport(kind, ours, "d")
    peer = node_of(source, {theirs.name: theirs.advertise()})
    transport.connect(peer)
    return source, transport, peer, ours


INSIDE = {
    "bus": [
        (BusReads, "_patience_ms"),
        (BusReads, "_begin"),
        (BusReads, "_advance"),
        (BusReads, "_expire"),
        (zmq.Poller, "poll"),
        (zmq.Context, "socket"),
    ],
    "nixl": [(NixlReads, "_poll"), (NixlReads, "_post_all"), (NixlReads, "_landed")],
}


def test_an_error_that_nobody_foresaw_is_one_of_reads_and_not_of_the_transport(
    threaded: Pair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, transport, peer, ours = threaded
    begun = []
    for number, (kind, method) in enumerate(INSIDE[transport.name]):
        caplog.clear()
        transport.forget(peer.node_id)  # or an idle socket would be used
        transport.connect(peer)
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, broken_once(getattr(kind, method)))
            results: queue.SimpleQueue[Digests | TransferError] = queue.SimpleQueue()
            deadline_s = time.monotonic() + WAIT_S
            for block in range(3):
                read = Read(peer, [block], ours.blocks, [block], deadline_s, results.put)
                transport.read(read)
            found = [results.get(timeout=WAIT_S) for _ in range(3)]
        failed = [str(one) for one in found if isinstance(one, TransferError)]
        lost = [one for one in failed if one == "internal: RuntimeError: nobody foresaw this"]
        later = [one for one in failed if one.endswith("is not connected")]
        assert sorted(failed) == sorted(lost + later), method
        begun.append(bool(lost))
        assert len([record for record in caplog.records if record.exc_info]) == 1, method
        ours.blocks[:] = 0
        transport.connect(peer)
        read_now(transport, peer, [number], ours.blocks, [1], WAIT_S)
        assert (ours.blocks[1] == source.blocks[number]).all()
        assert results.empty(), "each ends once"
    assert sum(begun) >= 3, "not all of them happen between two READs"


def broken_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """On the thread of a transport."""
    left = ["once"]

    def call(*arguments: Any, **words: Any) -> Any:
        if left and threading.current_thread().name in ("kv-bus", "kv-nixl"):
            left.pop()
            raise RuntimeError("nobody foresaw this")
        return method(*arguments, **words)

    return call


def test_no_more_sockets(
    make_transport: MakeTransport, make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    theirs, transport = make_transport("tcp", source, "p"), make_transport("tcp", ours, "d")
    peer = node_of(source, {"bus": theirs.advertise()})

    def refuse(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(zmq.Context, "socket", refuse)
        with pytest.raises(TransferError) as raised:
            read_now(transport, peer, [0], ours.blocks, [1], WAIT_S)
        assert raised.value.cause == "socket"
        with pytest.raises(TransferError, match="socket"):
            transport.connect(peer)
    read_now(transport, peer, [0], ours.blocks, [1], WAIT_S)


def test_a_question_that_breaks_the_server_is_not_its_last(
    make_transport: MakeTransport, make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ours = make_segment("prefill-0"), make_segment("decode-0", fill=2)
    theirs, transport = make_transport("tcp", source, "p"), make_transport("tcp", ours, "d")
    peer = node_of(source, {"bus": theirs.advertise()})

    def refuse(*_: object) -> None:
        raise RuntimeError("nobody foresaw this")

    with monkeypatch.context() as patch:
        patch.setattr(BusServer, "_refusal", refuse)
        with pytest.raises(TransferError, match="timeout"):
            read_now(transport, peer, [0], ours.blocks, [1], 0.2)
    read_now(transport, peer, [0], ours.blocks, [1], WAIT_S)
