"""Names of hosts become numbers here, and not in ZeroMQ.

ZeroMQ looks a name up in its one I/O thread, at each attempt to connect, and all of a process's
messages stand still until a name server has answered: in a network of containers that reaches no
other one, ten seconds for each name of somebody who has gone.
"""

import ipaddress
import socket
import threading
from dataclasses import dataclass

FRESH_S = 2.0
"""So long after an answer, or none, a name is not asked for again: who starts anew may have another
number."""
ASKING_MAX = 32
KNOWN_MAX = 1024
"""More are forgotten, the oldest first."""
FIRST_WAIT_S = 0.05
"""The first time a name is wanted: most answers are there by then."""


@dataclass(slots=True)
class _Name:
    asked_s: float
    asking: bool
    numeric: str | None = None
    """The address with the number; the last one that there was."""


class Names:
    """For one thread; each question is asked in another."""

    def __init__(self) -> None:
        self._known: dict[str, _Name] = {}

    def numeric(self, address: str, now_s: float) -> str | None:
        """The bus address with a number for its host; None: not known, at least not yet."""
        host, _ = split(address)
        if not host or is_number(host):
            return address
        name = self._known.get(address)
        if name is None or (not name.asking and now_s - name.asked_s >= FRESH_S):
            self._look_up(address, now_s)
            name = self._known.get(address)
        return name.numeric if name else None

    def _look_up(self, address: str, now_s: float) -> None:
        if sum(each.asking for each in self._known.values()) >= ASKING_MAX:
            return
        name, first = self._known.get(address), address not in self._known
        if name is None:
            name = self._known[address] = _Name(now_s, asking=False)
            if len(self._known) > KNOWN_MAX:
                del self._known[next(iter(self._known))]
        name.asked_s, name.asking = now_s, True
        thread = threading.Thread(target=_ask, args=(name, *split(address)), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no room for one: another time
            name.asking = False
            return
        if first:
            thread.join(FIRST_WAIT_S)


def split(address: str) -> tuple[str, str]:
    """Host and port of a tcp address; empty words of any other."""
    scheme, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    return (host.strip("[]"), port) if scheme == "tcp" else ("", "")


def is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ask(name: _Name, host: str, port: str) -> None:
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # Who listens at 0.0.0.0 is not there by IPv6, whatever a name server says first.
        answers.sort(key=lambda answer: answer[0] != socket.AF_INET)
        found = str(answers[0][4][0])
        name.numeric = f"tcp://[{found}]:{port}" if ":" in found else f"tcp://{found}:{port}"
    except (OSError, UnicodeError):
        pass  # what was known before may still be true
    finally:
        name.asking = False
