"""Recordings: everything that a machine was told, and what it answered, with times.

A file is a sequence of records: 4 bytes of length (little endian), then msgpack of `[now_s,
[name, fields], [[name, fields], …]]` for the event and its effects. Times are those of the host's
monotonic clock, so files of one host can be merged. Recordings contain prompts and answers: they
are for tests and for the hunt for a bug.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from slipstream.config import SetupError, make_folder
from slipstream.core.machine import Effect, Event

RECORDING_BYTES_MAX = 64 << 20
_LENGTH_BYTES = 4

log = logging.getLogger(__name__)


class Recorder:
    """Writes `{folder}/{node_id}-{epoch}.rec`, of mode 0600, until the file is full."""

    def __init__(self, folder: Path, name: str, bytes_max: int = RECORDING_BYTES_MAX) -> None:
        """`name` is that of the file, without its suffix. StartError if it cannot be made."""
        self.path = folder / f"{name}.rec"
        self._room = bytes_max
        self._encode = msgspec.msgpack.Encoder().encode
        make_folder("slipstream", "--record", folder, 0o700)
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as error:
            raise SetupError(f"slipstream: --record {folder}: {error.strerror}") from None

    def write(self, now_s: float, event: Event, effects: Sequence[Effect]) -> None:
        """Not buffered: what a process saw before it was killed can be read."""
        if self._room < 0:
            return
        record = self._encode((now_s, _named(event), [_named(effect) for effect in effects]))
        frame = len(record).to_bytes(_LENGTH_BYTES, "little") + record
        self._room -= len(frame)
        if self._room < 0:
            log.error("recording %s is full; nothing more is recorded", self.path)
            return
        try:
            written = os.write(self._file, frame)
        except OSError as error:
            self._room = -1
            log.error("recording %s ends: %s", self.path, error.strerror)
        else:
            if written < len(frame):
                self._room = -1
                log.error("recording %s ends: the disk is full", self.path)

    def close(self) -> None:
        self._room = -1
        os.close(self._file)


def _named(item: Event | Effect) -> tuple[str, Event | Effect]:
    return type(item).__name__, item


def read(path: Path) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """Yields (now_s, class name, fields): each event, then the effects that it had.

    Messages in `Received` and `Send` name their class in the field `type`. What a killed process
    wrote in part is left out.
    """
    data = path.read_bytes()
    at = 0
    while at + _LENGTH_BYTES <= len(data):
        begin = at + _LENGTH_BYTES
        at = begin + int.from_bytes(data[at:begin], "little")
        if at > len(data):
            return
        now_s, event, effects = msgspec.msgpack.decode(data[begin:at])
        for name, fields in (event, *effects):
            yield now_s, name, fields
