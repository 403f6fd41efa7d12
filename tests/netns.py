"""Two hosts on one: a network namespace that a pair of virtual interfaces joins to ours."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple


class Joined(NamedTuple):
    """Our end and the other namespace."""

    name: str
    ours: str
    theirs: str
    """Addresses."""
    interface: str
    """Our end of the pair."""
    there: str

    @property
    def wrap(self) -> tuple[str, ...]:
        """Put before a command, it runs in the other namespace."""
        return ("ip", "netns", "exec", self.name)

    @property
    def received_bytes(self) -> int:
        """What has come through the pair since it was made."""
        return self._count("rx_bytes")

    @property
    def sent_bytes(self) -> int:
        return self._count("tx_bytes")

    def _count(self, name: str) -> int:
        return int(Path(f"/sys/class/net/{self.interface}/statistics/{name}").read_text())


def refusal() -> str:
    """Why there can be no namespaces here; empty if there can."""
    name = f"slip{os.getpid()}t"
    try:
        _ip("netns", "add", name)
    except FileNotFoundError:
        return "no command ip (Debian package iproute2)"
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.decode().strip()}"
    _ip("netns", "del", name)
    return ""


@contextmanager
def joined() -> Iterator[Joined]:
    number = os.getpid() % 65_000
    net = f"10.{200 + number // 256 % 50}.{number % 256}"
    pair = Joined(f"slip{number}", f"{net}.1", f"{net}.2", f"slo{number}", f"sli{number}")
    _ip("netns", "add", pair.name)
    try:
        _ip("link", "add", pair.interface, "type", "veth", "peer", pair.there, "netns", pair.name)
        _ip("addr", "add", f"{pair.ours}/30", "dev", pair.interface)
        _ip("link", "set", pair.interface, "up")
        _ip("-n", pair.name, "addr", "add", f"{pair.theirs}/30", "dev", pair.there)
        _ip("-n", pair.name, "link", "set", pair.there, "up")
        _ip("-n", pair.name, "link", "set", "lo", "up")
        yield pair
    finally:
        with suppress(subprocess.CalledProcessError):  # if it was never made
            _ip("link", "del", pair.interface)  # now; with its namespace it would go some time
        _ip("netns", "del", pair.name)


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True)
