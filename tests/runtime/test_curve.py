"""The bus with keys: who comes in, as what, and what is said to those who cannot begin."""

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from runtime.cluster import free_port
from slipstream import curve
from slipstream.config import ConfigError, SetupError, resolve
from slipstream.core.link import Transmit
from slipstream.decode.config import DecodeConfig
from slipstream.messages import WIRE_VERSION, FrameHeader
from slipstream.runtime.bus import Bus
from slipstream.scheduler.config import SchedulerConfig
from slipstream.types import Role, role_of

HEADER = FrameHeader(WIRE_VERSION, "decode-0", 1, "", 1, 0, 0, 0)
Received = tuple[bytes, bytes, Role | None]
MakeBus = Callable[..., tuple[Bus, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert curve.generate(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def make() -> Iterator[MakeBus]:
    made = []

    def bus(folder: Path | str, role: Role) -> tuple[Bus, str]:
        address = f"tcp://127.0.0.1:{free_port()}"
        made.append(Bus("slipstream test", address, curve.load(str(folder), role)))
        return made[-1], address

    yield bus
    for each in made:
        each.close(linger_s=0.0)


def comes_in(bus: Bus, within_s: float = 5.0) -> Received | None:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if frame := bus.receive():
            return frame
        time.sleep(0.01)
    return None


def test_holders_of_keys_hear_each_other_and_know_the_role(folder: Path, make: MakeBus) -> None:
    scheduler, scheduler_at = make(folder, Role.SCHEDULER)
    decode, decode_at = make(folder, Role.DECODE)
    decode.transmit(Transmit("scheduler", scheduler_at, HEADER, b"up"), 0.0)
    frame = comes_in(scheduler)
    assert frame is not None and frame[1:] == (b"up", Role.DECODE)
    scheduler.transmit(Transmit("decode-0", decode_at, HEADER, b"down"), 0.0)
    frame = comes_in(decode)
    assert frame is not None and frame[1:] == (b"down", Role.SCHEDULER)


def test_without_a_key_nobody_is_heard(
    folder: Path, tmp_path: Path, make: MakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, address = make(folder, Role.SCHEDULER)
    bare, _ = make("", Role.DECODE)
    curve.generate(tmp_path / "other")
    stranger, _ = make(tmp_path / "other", Role.DECODE)
    (tmp_path / "other" / "decode" / "scheduler.public").write_bytes(
        (folder / "decode" / "scheduler.public").read_bytes()
    )
    informed, _ = make(tmp_path / "other", Role.DECODE)  # knows whom it speaks to
    with caplog.at_level(logging.WARNING):
        for bus in (bare, stranger, informed):
            bus.transmit(Transmit("scheduler", address, HEADER, b"let me in"), 0.0)
        assert comes_in(scheduler, within_s=1.0) is None
    assert [record.message for record in caplog.records] == [
        "refused a connection: its key is nobody's here"
    ]


def test_a_peer_that_cannot_prove_its_role_hears_nothing(folder: Path, make: MakeBus) -> None:
    """Somebody has taken the scheduler's place who has the key of a frontend alone."""
    impostor, address = make(folder, Role.FRONTEND)
    decode, _ = make(folder, Role.DECODE)
    decode.transmit(Transmit("scheduler", address, HEADER, b"secret"), 0.0)
    assert comes_in(impostor, within_s=1.0) is None
    decode.transmit(Transmit("frontend-0", address, HEADER, b"open"), 0.0)
    assert comes_in(impostor) is not None


def test_a_peer_of_no_role_is_not_spoken_to(folder: Path, make: MakeBus) -> None:
    decode, _ = make(folder, Role.DECODE)
    decode.transmit(Transmit("nobody-0", "tcp://127.0.0.1:1", HEADER, b"x"), 0.0)
    assert (decode.frames_sent, decode.frames_dropped) == (0, 1)


def test_a_door_that_is_gone_lets_nobody_in(folder: Path) -> None:
    """ZeroMQ alone would let in whoever has any key at all."""
    with zmq.Context() as context:
        keys = curve.load(str(folder), Role.SCHEDULER)
        assert keys is not None
        inbox, outgoing = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        keys.serve(inbox)
        port = inbox.bind_to_random_port("tcp://127.0.0.1")
        keys.approach(outgoing, "scheduler")
        outgoing.connect(f"tcp://127.0.0.1:{port}")
        outgoing.set(zmq.LINGER, 0)
        outgoing.send(b"x")
        assert not inbox.poll(500)
        inbox.close()
        outgoing.close()


# --- Names, files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("scheduler", Role.SCHEDULER),
        ("decode-0", Role.DECODE),
        ("prefill-host-17", Role.PREFILL),
        ("decoder-0", None),
        ("", None),
        ("-decode", None),
    ],
)
def test_a_role_by_its_name(name: str, role: Role | None) -> None:
    assert role_of(name) is role


def test_each_role_gets_its_own_secret_and_all_public_keys(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(Role)
    secrets = set()
    for role in Role:
        own = folder / role
        assert stat.S_IMODE((own / "secret").stat().st_mode) == 0o400
        assert {path.name for path in own.iterdir()} == {"secret", *(f"{r}.public" for r in Role)}
        secrets.add((own / "secret").read_bytes())
        keys = curve.load(str(folder), role)
        assert keys is not None and zmq.curve_public(keys.secret) == keys.public[role]
    assert len(secrets) == len(Role)


def test_keys_that_are_there_stay(folder: Path) -> None:
    before = (folder / "decode" / "secret").read_bytes()
    assert not curve.generate(folder)
    assert (folder / "decode" / "secret").read_bytes() == before
    (folder / "prefill" / "secret").unlink()
    with pytest.raises(SetupError, match="keys of other roles are not"):
        curve.generate(folder)


def test_keys_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"scheduler/secret: No such file.*slipstream keys make"):
        curve.load(str(tmp_path / "nowhere"), Role.SCHEDULER)
    secret = folder / "scheduler" / "secret"
    secret.chmod(0o440)
    with pytest.raises(SetupError, match="can be read by others; chmod 400"):
        curve.load(str(folder), Role.SCHEDULER)
    secret.chmod(0o600)
    secret.write_text("short")
    with pytest.raises(SetupError, match="5 bytes, a key has 40"):
        curve.load(str(folder), Role.SCHEDULER)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.1.2.3", "[::]", "worker-7"])
def test_the_open_bus_is_for_those_who_ask_for_it(host: str, tmp_path: Path) -> None:
    run_dir, listen = str(tmp_path), f"tcp://{host}:7000"
    with pytest.raises(ConfigError, match=r"--keys-dir.*--insecure-bus"):
        resolve(SchedulerConfig(run_dir=run_dir, listen=listen), os.environ)
    for allowed in ({"insecure_bus": True}, {"keys_dir": "/keys"}):
        resolve(SchedulerConfig(run_dir=run_dir, listen=listen, **allowed), os.environ)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_this_machine_needs_no_keys(host: str, tmp_path: Path) -> None:
    resolve(SchedulerConfig(run_dir=str(tmp_path), listen=f"tcp://{host}:7000"), os.environ)


def test_with_keys_a_name_says_the_role(tmp_path: Path) -> None:
    common = {"run_dir": str(tmp_path), "model": "/m", "keys_dir": "/keys"}
    with pytest.raises(ConfigError, match="has to be decode or to begin with decode-"):
        resolve(DecodeConfig(node_id="worker-1", **common), os.environ)
    resolve(DecodeConfig(node_id="decode-1", **common), os.environ)
    resolve(DecodeConfig(**common), os.environ)
