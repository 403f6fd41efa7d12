"""Addresses that are taken, stale or no good; pages; garbage on the bus."""

import json
import os
import random
import socket
import stat
from pathlib import Path

import pytest
import zmq

from runtime.cluster import Cluster, free_port, until
from slipstream.core.node import encode_header
from slipstream.messages import WIRE_VERSION, FrameHeader
from slipstream.runtime.bus import Bus


def test_a_living_listener_keeps_its_address(any_cluster: Cluster) -> None:
    first = any_cluster.echo()
    until(lambda: first.saw("Started"), "a start")
    second = any_cluster.echo()
    assert second.wait() == 5
    line = f"slipstream scheduler: --listen {any_cluster.address('scheduler')}: in use by "
    assert second.errors.startswith(line)
    if any_cluster.scheme == "tcp":
        assert f"pid {first.process.pid} " in second.errors
    asker = any_cluster.asker(questions=3)
    until(lambda: asker.saw("Received") >= 4, "answers of the first one")


def test_a_listener_of_another_kind_keeps_its_path(cluster: Cluster) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        path = cluster.folder / "scheduler.sock"
        other.bind(str(path))
        other.listen(1)
        inode = path.stat().st_ino
        assert cluster.echo().wait() == 5
        assert path.stat().st_ino == inode


def test_a_stale_socket_is_replaced_and_a_file_is_not(cluster: Cluster) -> None:
    path = cluster.folder / "scheduler.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    echo = cluster.echo()
    until(lambda: echo.saw("Started"), "a start")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert echo.end() == 0
    path.write_text("precious")
    refused = cluster.echo()
    assert refused.wait() == 3
    assert "exists and is not a socket" in refused.errors
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "listen", ["ipc:///nowhere/at/all.sock", "tcp://192.0.2.1:7000", "tcp://no-such-place:7000"]
)
def test_an_address_that_cannot_be_bound_is_one_line(cluster: Cluster, listen: str) -> None:
    echo = cluster.echo(listen=listen)
    assert echo.wait() == 3
    assert echo.errors.startswith(f"slipstream scheduler: --listen {listen}: ")
    assert len(echo.errors.splitlines()) == 1


def test_pages(cluster: Cluster) -> None:
    asker = cluster.asker(metrics_port=free_port(), questions=7, drain_s=-1.0, record="")
    until(lambda: asker.get("/livez")[0] == 200, "a living loop")
    status, body = asker.get("/readyz")
    assert (status, json.loads(body)["reason"]) == (503, "no session with the scheduler")
    cluster.echo()
    until(lambda: asker.get("/readyz")[0] == 200, "readiness")
    until(lambda: asker.metric("answers_total") == 7, "a counter of the machine")
    text = asker.get("/metrics")[1]
    assert 'slipstream_answers_total{node_id="asker-0",role="frontend"} 7.0' in text
    assert "# TYPE slipstream_answers_total counter" in text
    assert "# TYPE slipstream_loop_lag_seconds gauge" in text
    assert "process_resident_memory_bytes" in text
    assert asker.metric("peers_up") == 1
    asker.signal(15)
    until(lambda: json.loads(asker.get("/readyz")[1])["reason"] == "draining", "a drain")


def test_a_machine_that_is_not_ready_says_why(cluster: Cluster) -> None:
    asker = cluster.asker(metrics_port=free_port(), executor="unready")
    cluster.echo()
    until(lambda: asker.metric("peers_up") == 1, "a session")
    status, body = asker.get("/readyz")
    assert (status, json.loads(body)["reason"]) == (503, "was told so")
    assert asker.metric("hands") == 2  # of the executor


def test_a_taken_metrics_port_names_its_holder(cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        echo = cluster.echo(metrics_port=port)
        assert echo.wait() == 5
    assert f"port {port} is taken by pid {os.getpid()} " in echo.errors
    assert not (cluster.folder / "scheduler.sock").exists()


def garbage(random: random.Random) -> list[bytes]:
    """A multipart message: noise, or a frame that is nearly right."""
    if random.random() < 0.3:
        return [random.randbytes(random.randrange(40)) for _ in range(random.randrange(1, 6))]
    header = FrameHeader(
        version=random.choice([WIRE_VERSION, WIRE_VERSION, 0, 2**63]),
        source=random.choice(["asker-0", "scheduler", "", "\0", "x" * 1000, "stranger"]),
        epoch=random.choice([0, -1, 1, 2**63 - 1]),
        address=random.choice(["", "ipc://", "tcp://", "nonsense", "tcp://x:y", "ipc:///nowhere"]),
        session=random.choice([0, -1, 1, 2**63 - 1]),
        peer_session=random.choice([0, -1, 1, 2**63 - 1]),
        seq=random.choice([0, 1, 2, -1, 2**63 - 1]),
        ack=random.choice([0, 1, -1, 2**63 - 1]),
    )
    raw = bytearray(encode_header(header))
    if random.random() < 0.3:
        raw[random.randrange(len(raw))] = random.randrange(256)
    return [bytes(raw), random.choice([b"", b"\x80", random.randbytes(50)])]


def nested(outermost: bytes) -> bytes:
    """Deeper than any decoder follows."""
    return outermost + b"\x91" * 100_000


def evil_frames() -> list[list[bytes]]:
    header = encode_header(FrameHeader(WIRE_VERSION, "evil", 1, "", 1, 0, 1, 0))
    longer = bytes([header[0] + 1]) + header[1:]  # one more element than is known
    return [[nested(longer), b""], [header, nested(b"\x82\xa4type\xa5Hello\xa1x")]]


@pytest.mark.parametrize("seed", range(3))
def test_garbage_is_counted_and_harms_nobody(cluster: Cluster, seed: int) -> None:
    echo = cluster.echo(metrics_port=free_port())
    until(lambda: echo.saw("Started"), "a start")
    noise = random.Random(seed)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDTIMEO, 10_000)
        dealer.connect(cluster.address("scheduler"))
        for _ in range(3000):
            dealer.send_multipart(garbage(noise))
        for frame in evil_frames():
            dealer.send_multipart(frame)
        until(lambda: echo.metric("bus_frames_received_total") >= 3002, "all of it")
    assert echo.metric("bus_frames_malformed_total") > 500
    assert echo.process.poll() is None, echo.errors
    friend = cluster.asker("friend", questions=3)
    until(lambda: friend.saw("Received") >= 4, "answers all the same")


def test_raw_bytes_on_the_socket_are_survived(cluster: Cluster) -> None:
    echo = cluster.echo()
    until(lambda: echo.saw("Started"), "a start")
    for seed in range(20):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(cluster.folder / "scheduler.sock"))
            raw.sendall(random.Random(seed).randbytes(2000))
    asker = cluster.asker(questions=3)
    until(lambda: asker.saw("Received") >= 4, "answers all the same")


def test_a_slow_peer_costs_a_bounded_queue(short_path: Path) -> None:
    """Nobody listens there: what does not fit is dropped and counted, and nothing blocks."""
    from slipstream.core.link import Transmit
    from slipstream.runtime.bus import QUEUED_FRAMES_MAX

    bus = Bus("slipstream test", f"ipc://{short_path}/a.sock")
    header = FrameHeader(WIRE_VERSION, "a", 1, "", 1, 0, 0, 0)
    for number in range(QUEUED_FRAMES_MAX + 500):
        bus.transmit(Transmit("b", f"ipc://{short_path}/b.sock", header, b"x"), float(number))
    assert bus.frames_sent == QUEUED_FRAMES_MAX
    assert bus.frames_dropped == 500
    bus.forget("b")
    bus.transmit(Transmit("b", f"ipc://{short_path}/b.sock", header, b"x"), 0.0)
    assert bus.frames_sent == QUEUED_FRAMES_MAX + 1
    bus.close(linger_s=0.0)
    assert not list(short_path.iterdir())
