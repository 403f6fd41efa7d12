"""Who holds a TCP port: asked before anything starts, and when a bind fails."""

import errno
import os
import socket
from pathlib import Path

from slipstream.config import SetupError, StartError
from slipstream.errors import ExitCode

_LISTEN = "0A"


def port_error(prog: str, flag: str, host: str, port: int, error: OSError) -> StartError:
    """Why nobody can listen there: who else does, or the kernel's reason. `flag`: where the port
    comes from; the line begins with `prog`."""
    if error.errno == errno.EADDRINUSE:
        line = f"{prog}: port {port} is taken by {holder(port)}; choose another one by {flag}"
        return StartError(line, ExitCode.PORT)
    return SetupError(f"{prog}: cannot listen on {host}:{port}: {error.strerror or error}")


def require_free(prog: str, flag: str, host: str, port: int) -> None:
    """StartError: nobody can listen there."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise SetupError(f"{prog}: --host {host}: {error.strerror}") from None
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise port_error(prog, flag, host, port, error) from None


def holder(port: int) -> str:
    """`pid 1234 (slipstream frontend …)`, or that it is a process we may not see."""
    inodes = _listening_inodes(port)
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _holds(process, inodes):
            return f"pid {process.name} ({_command_line(process)})"
    return "a process of another user"


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                found.add(columns[9])
    return found


def _holds(process: Path, inodes: set[str]) -> bool:
    links = {f"socket:[{inode}]" for inode in inodes}
    try:
        for descriptor in (process / "fd").iterdir():
            try:
                if os.readlink(descriptor) in links:
                    return True
            except OSError:
                continue
    except OSError:
        pass  # it ended meanwhile, or belongs to another user
    return False


def _command_line(process: Path) -> str:
    try:
        raw = (process / "cmdline").read_bytes()
    except OSError:
        return "gone meanwhile"
    words = raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return words if len(words) <= 80 else words[:79] + "…"
