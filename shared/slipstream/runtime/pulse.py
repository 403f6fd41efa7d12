"""Whether a loop still turns: told to who supervises the process, and watched over from within.

The words to the supervisor are those of sd_notify(3).
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
from contextlib import suppress

from slipstream.errors import ExitCode

ALIVE = b"WATCHDOG=1"
LOOK_S = 1.0

_log = logging.getLogger(__name__)


class Pulse:
    """`beat` is the loop's to call, more than once a second. If it stays away for `watchdog_s` a
    thread shows where everybody stands and ends the process; 0: it does not."""

    def __init__(self, watchdog_s: float, notify_socket: str = "") -> None:
        self._beats = 0
        self._stop = threading.Event()
        self._to = notify_socket
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if notify_socket else None
        if self._socket is not None:
            self._socket.setblocking(False)
        if watchdog_s:
            looks = max(2, round(watchdog_s / LOOK_S))
            watch = threading.Thread(target=self._watch, args=(looks,), name="pulse", daemon=True)
            watch.start()

    def beat(self) -> None:
        self._beats += 1
        if self._socket is not None:
            with suppress(OSError):  # it is busy, or gone: then nothing can be told
                self._socket.sendto(ALIVE, self._to)

    def close(self) -> None:
        self._stop.set()
        if self._socket is not None:
            self._socket.close()

    def _watch(self, looks: int) -> None:
        """Counts its own looks, not seconds: a process that was stopped as a whole may go on."""
        seen, idle = self._beats, 0
        while not self._stop.wait(LOOK_S):
            seen, idle = self._beats, idle + 1 if seen == self._beats else 0
            if idle >= looks:
                _log.critical("ends: its loop has stood still for %d s", idle)
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                os._exit(ExitCode.FAULT)
