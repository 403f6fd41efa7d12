"""The audit log: who asked for what, and what came of it, a line of JSON each.

Nothing of a prompt or an answer, no header, no key. One thread writes; requests wait for nothing. A
file that was renamed is followed by a new one, as logrotate wants it, without a signal. Several
frontends may have the same file: a line is written at once, at its end.
"""

import errno
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from slipstream.config import SetupError

LINES_MAX = 8192
"""That wait for the disk."""
BATCH = 256
TEXT_CHARS_MAX = 200
RETRY_S = 1.0
CLOSE_S = 1.0

_log = logging.getLogger("slipstream.frontend")


class Line(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request that is over, or something else that somebody did."""

    time: str = ""
    """UTC; of the end."""
    node: str = ""
    act: str
    """`request`, or of the process: `started`, `keys_read`, `keys_unusable`, `lines_dropped`, …"""
    request_id: str = ""
    answer_id: str = ""
    key: str = ""
    """The name of the API key."""
    client: str = ""
    """The address that the connection came from: of a proxy its own."""
    method: str = ""
    path: str = ""
    model: str = ""
    status: int = 0
    """499: the client left."""
    error: str = ""
    """A code of docs/errors.md."""
    finish_reasons: list[str] = []
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_ms: float | None = None
    duration_ms: float | None = None
    workers: str = ""
    """As x-slipstream-path."""
    goes_on: bool = False
    """It was begun at another frontend, which counted its prompt."""
    text: str = ""


_STRINGS = [f.name for f in msgspec.structs.fields(Line) if f.type is str]


def safe(text: str) -> str:
    """Short, one line, printable ASCII: what a client wrote can forge no line and no terminal's
    commands."""
    cut = text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}..."
    return cut.encode("ascii", "backslashreplace").decode()


def line(values: Line) -> bytes:
    for name in _STRINGS:
        setattr(values, name, safe(getattr(values, name)))
    return msgspec.json.encode(values) + b"\n"


def require_file(path: str) -> int:
    """Open, at its end. SetupError: it cannot be written to."""
    try:
        return _opened(path)
    except OSError as error:
        raise SetupError(f"slipstream: --audit-log {path}: {error.strerror}") from None


def _opened(path: str) -> int:
    # O_NONBLOCK: of a pipe that nobody reads.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(path, flags, 0o600)


class Audit:
    def __init__(self, path: str, node: str) -> None:
        """SetupError: the file cannot be written to."""
        self._path, self._node = path, node
        self._waiting: queue.Queue[bytes | None] = queue.Queue(LINES_MAX)
        self._counts: Counter[str] = Counter()
        self._untold = 0
        """Lines that were dropped and of which the log does not say so yet."""
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._torn = self._failed = False
        self._file = require_file(path)
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()
        self.act("started")

    def act(self, act: str, text: str = "") -> None:
        self.note(Line(act=act, text=text))

    def note(self, values: Line) -> None:
        """Never waits. `time` and `node` are filled in."""
        values.time, values.node = _now(), self._node
        self._put(line(values))

    def statistics(self) -> dict[str, float]:
        return {
            "audit_lines_total": float(self._counts["audit_lines"]),
            "audit_dropped_total": float(self._counts["audit_dropped"]),
        }

    def close(self) -> None:
        """What waits is written, if the disk takes it in time."""
        self.act("stopped")
        self._ended.set()
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _put(self, data: bytes) -> None:
        try:
            self._waiting.put_nowait(data)
        except queue.Full:
            self._drop(1)

    def _drop(self, count: int) -> None:
        with self._lock:
            self._counts["audit_dropped"] += count
            self._untold += count

    # --- The thread ---

    def _write_all(self) -> None:
        while (data := self._waiting.get()) is not None:
            batch = [data]
            while len(batch) < BATCH and not self._waiting.empty():
                if (data := self._waiting.get()) is None:
                    self._write(batch)
                    return
                batch.append(data)
            self._write(batch)

    def _write(self, batch: Sequence[bytes]) -> None:
        written = 0
        try:
            self._follow()
            written = self._append(b"".join(batch))
            if written < len(batch):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._failed:
                _log.error("--audit-log %s: %s; lines are dropped", self._path, error.strerror)
            self._failed = True
            self._drop(len(batch) - written)
        else:
            if self._failed:
                _log.info("--audit-log %s is written again", self._path)
            self._failed = False
        self._counts["audit_lines"] += written
        if self._failed:
            self._ended.wait(RETRY_S)
        elif self._untold:
            with self._lock:
                count, self._untold = self._untold, 0
            self.act("lines_dropped", str(count))

    def _append(self, data: bytes) -> int:
        """Lines that were written whole. At once, or other frontends' lines would stand within
        ours; what a full disk has cut is ended before the next line."""
        before = b"\n" if self._torn else b""
        done = os.write(self._file, before + data) - len(before)
        if done >= 0:
            self._torn = not data[:done].endswith(b"\n") and bool(done)
        return data[: max(0, done)].count(b"\n")

    def _follow(self) -> None:
        """To the file that has the name now."""
        try:
            there = os.stat(self._path)
            same = os.path.samestat(there, os.fstat(self._file))
        except FileNotFoundError:
            same = False
        if not same:
            before, self._file = self._file, _opened(self._path)
            os.close(before)
            self._torn = False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
