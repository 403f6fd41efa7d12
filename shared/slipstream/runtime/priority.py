"""How a process stands back for others of its machine."""

import os
from contextlib import suppress
from pathlib import Path


def stand_back(nice: int) -> None:
    """Lowers this thread's priority by `nice`, and that of all threads that it will start.

    Where the kernel shares the cores out among sessions (autogroup), niceness counts within one of
    them alone; then a process that has a session of its own lowers that of the session.
    """
    if not nice:
        return
    os.nice(nice)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # there is no such thing here
            Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")
