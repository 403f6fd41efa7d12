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
FIRST_WAIT_S = 0.05
"""The first time a name is wanted: most answers are there by then."""


@dataclass(slots=True)
class _Name:
    asked_s: float
    asking: bool = True
    numeric: str | None = None
    """The address with the number; the last one that there was."""


class Names:
    """For one thread; each question is asked in another."""

    def __init__(self) -> None:
        self._known: dict[str, _Name] = {}

    def numeric(self, address: str, now_s: float) -> str | None:
        """The bus address with a number for its host; None: not known, at least not yet."""
        host, port = split(address)
        if not host or is_number(host):
            return address
        name = self._known.get(address)
        if name is None:
            if sum(each.asking for each in self._known.values()) >= ASKING_MAX:
                return None
            name = self._known[address] = _Name(now_s)
            _ask(name, host, port).join(FIRST_WAIT_S)
        elif not name.asking and now_s - name.asked_s >= FRESH_S:
            name.asked_s, name.asking = now_s, True
            _ask(name, host, port)
        return name.numeric


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


def _ask(name: _Name, host: str, port: str) -> threading.Thread:
    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
            name.numeric = (
                f"tcp://[{found}]:{port}" if ":" in str(found) else f"tcp://{found}:{port}"
            )
        except (OSError, UnicodeError):
            pass  # what was known before may still be true
        finally:
            name.asking = False

    thread = threading.Thread(target=ask, name=f"name {host}", daemon=True)
    thread.start()
    return thread
