"""Who a process is: its epoch, and the host that it shares memory with."""

import os
import socket
import time
from pathlib import Path

from slipstream.config import ServiceConfig, SetupError
from slipstream.types import Epoch


def new_epoch(config: ServiceConfig) -> Epoch:
    """The time in ns, raised above what an earlier process of this node id used: a clock may have
    been set back. StartError if the run directory cannot be written."""
    path = Path(config.run_dir) / f"{config.node_id}.epoch"
    try:
        earlier = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        earlier = 0
    epoch = max(time.time_ns(), earlier + 1)
    written = path.with_suffix(".epoch-new")
    try:
        written.write_text(str(epoch), encoding="ascii")
        written.replace(path)
    except OSError as error:
        line = f"slipstream {config.role}: --run-dir {config.run_dir}: {error.strerror}"
        raise SetupError(line) from None
    return epoch


def host_identity(shm_dir: str = "/dev/shm") -> str:
    """Equal for two processes exactly if they can share memory: one kernel, one folder for it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.stat(shm_dir).st_dev}"
    except OSError:
        return socket.gethostname()
