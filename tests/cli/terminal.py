"""The command in a terminal of its own, as a person sees and types it."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

WAIT_S = 20.0
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[>=]")


class Terminal:
    """24 lines of 80 columns."""

    def __init__(self, *argv: str) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        path = os.pathsep.join(filter(None, sys.path))

        def begin() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that ^C is a signal
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs us may ignore it

        self.process = subprocess.Popen(
            [sys.executable, "-m", "slipstream.cli.main", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": path},
            start_new_session=True,
            preexec_fn=begin,
        )
        os.set_blocking(self._master, False)
        self._slave = slave
        self.raw = ""

    @property
    def text(self) -> str:
        """All that was written, without what moves the cursor or colours."""
        self._read()
        return _ESCAPE.sub("", self.raw)

    def until(self, what: str, count: int = 1) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while self.text.count(what) < count:
            assert time.monotonic() < deadline_s, f"no {what!r} in {self.text!r}"
            time.sleep(0.02)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self.raw += data.decode("utf-8", "replace")
        except OSError:  # nothing more at this moment
            pass
