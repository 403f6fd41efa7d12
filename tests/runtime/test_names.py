"""Names of hosts are looked up beside what the process does."""

import socket
import threading
import time
from typing import Any

import pytest

from slipstream.runtime import names as module
from slipstream.runtime.names import ASKING_MAX, FIRST_WAIT_S, FRESH_S, Names


class Server:
    """What `getaddrinfo` is made to ask."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.answers = threading.Event()
        self.answers.set()
        self.asked: list[str] = []

    def __call__(self, host: str, port: str, **_: Any) -> list[Any]:
        self.asked.append(host)
        assert self.answers.wait(30)
        if host not in self.numbers:
            raise socket.gaierror(-2, "Name or service not known")
        return [(2, 1, 6, "", (self.numbers[host], int(port)))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(module.socket, "getaddrinfo", server)
    return server


def until(names: Names, address: str, expected: str | None, now_s: float) -> None:
    deadline_s = time.monotonic() + 10
    while names.numeric(address, now_s) != expected:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize(
    "address", ["ipc:///run/x.sock", "tcp://10.0.0.7:7000", "tcp://[fd00::7]:7000"]
)
def test_what_is_no_name_is_nobodys_question(server: Server, address: str) -> None:
    assert Names().numeric(address, 0.0) == address and not server.asked


def test_a_name_is_known_at_once_if_the_answer_comes_soon(server: Server) -> None:
    server.numbers["scheduler"] = "10.0.0.7"
    until(Names(), "tcp://scheduler:7000", "tcp://10.0.0.7:7000", 0.0)
    server.numbers["six"] = "fd00::7"
    until(Names(), "tcp://six:7000", "tcp://[fd00::7]:7000", 0.0)


def test_who_has_both_kinds_of_number_is_come_to_by_the_older_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [(10, 1, 6, "", ("::1", 7000, 0, 0)), (2, 1, 6, "", ("127.0.0.1", 7000))]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: answers)
    until(Names(), "tcp://localhost:7000", "tcp://127.0.0.1:7000", 0.0)


def test_names_are_forgotten_before_they_are_too_many(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KNOWN_MAX", 3)
    names = Names()
    for number in range(5):
        server.numbers[f"n{number}"] = f"10.0.0.{number}"
        until(names, f"tcp://n{number}:7000", f"tcp://10.0.0.{number}:7000", 0.0)
    assert len(names._known) == 3


def test_nobody_waits_for_a_server_that_does_not_answer(server: Server) -> None:
    server.answers.clear()
    names = Names()
    begin_s = time.monotonic()
    for turn in range(100):
        assert names.numeric("tcp://gone:7000", float(turn)) is None
    assert time.monotonic() - begin_s < 10 * FIRST_WAIT_S + 1, "waits once, and briefly"
    assert server.asked == ["gone"], "one question at a time"
    server.numbers["gone"] = "10.0.0.8"
    server.answers.set()
    until(names, "tcp://gone:7000", "tcp://10.0.0.8:7000", 99.0)


def test_who_starts_anew_with_another_number_is_found(server: Server) -> None:
    server.numbers["scheduler"] = "10.0.0.7"
    names = Names()
    until(names, "tcp://scheduler:7000", "tcp://10.0.0.7:7000", 0.0)
    server.numbers["scheduler"] = "10.0.0.9"
    assert names.numeric("tcp://scheduler:7000", FRESH_S / 2) == "tcp://10.0.0.7:7000"
    until(names, "tcp://scheduler:7000", "tcp://10.0.0.9:7000", FRESH_S)
    del server.numbers["scheduler"]
    names.numeric("tcp://scheduler:7000", 2 * FRESH_S)
    assert names.numeric("tcp://scheduler:7000", 2 * FRESH_S) == "tcp://10.0.0.9:7000", "the last"


def test_questions_are_bounded(server: Server) -> None:
    server.answers.clear()
    names = Names()
    before = threading.active_count()
    for number in range(ASKING_MAX + 10):
        assert names.numeric(f"tcp://gone-{number}:7000", 0.0) is None
    assert threading.active_count() - before == ASKING_MAX == len(server.asked)
    server.answers.set()
