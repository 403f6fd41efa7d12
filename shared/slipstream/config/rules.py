"""Rules that a service and whoever starts it share, so that both refuse with the same words."""

import ipaddress
import os
from pathlib import Path

from slipstream.config.values import SetupError, format_bytes
from slipstream.types import TRANSPORTS

AUTO_TRANSPORTS = "auto"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there; of a name, `localhost` alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_transports(names: str) -> None:
    """`auto`, or some of `TRANSPORTS` with commas between them. ValueError: what is wrong."""
    if names == AUTO_TRANSPORTS:
        return
    words = names.split(",")
    for word in words:
        if word not in TRANSPORTS:
            known = ", ".join(TRANSPORTS)
            raise ValueError(
                f"--transports: expected {AUTO_TRANSPORTS}, or some of {known} with commas between "
                f"them, got {word or repr(names)}"
            )
        if words.count(word) > 1:
            raise ValueError(f"--transports: {word} is there {words.count(word)} times in {names}")


def check_offload(disk_bytes: int, folder: str) -> None:
    """A tier on disk has a size and a place. ValueError: one of them is missing."""
    if disk_bytes and not folder:
        raise ValueError(
            f"--offload-disk-bytes {format_bytes(disk_bytes)} needs --offload-dir FOLDER"
        )
    if folder and not disk_bytes:
        raise ValueError(f"--offload-dir {folder} needs --offload-disk-bytes SIZE")


def check_ranks(tensor_parallel_size: int, offloads: bool) -> None:
    """ValueError: what a model in several processes cannot have."""
    if tensor_parallel_size > 1 and offloads:
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel_size}: there are no tiers below the pools of "
            "several ranks; leave --offload-host-bytes and --offload-disk-bytes out"
        )


def make_folder(prog: str, flag: str, folder: Path, mode: int = 0o777) -> None:
    """With its parents, unless it is there. SetupError: it cannot be made, or not be written."""
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except FileExistsError:
        pass  # as what, is told below
    except OSError as error:
        raise _unusable(prog, flag, folder, error.strerror or str(error)) from None
    require_folder(prog, flag, folder)


def require_folder(prog: str, flag: str, folder: Path) -> None:
    """SetupError: it is not there, or cannot be written."""
    if not folder.is_dir():
        raise _unusable(prog, flag, folder, "not a folder" if folder.exists() else "no such folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(prog, flag, folder, "it cannot be written")


def _unusable(prog: str, flag: str, folder: Path, reason: str) -> SetupError:
    return SetupError(f"{prog}: {flag} {folder}: {reason}; give a folder that can be written")
