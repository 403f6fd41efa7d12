"""What a file says now: read again whenever it has changed."""

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Generic, TypeVar

from slipstream.config import SetupError

T = TypeVar("T")
RELOAD_S = 1.0
"""How often the file is looked at."""

_log = logging.getLogger("slipstream.frontend")


class Watched(Generic[T]):
    def __init__(
        self,
        path: str,
        read: Callable[[str], T],
        otherwise: T,
        taken: Callable[[T], None] = lambda now: None,
        refused: Callable[[str], None] = lambda why: None,
    ) -> None:
        """`otherwise`: without a file; `taken` and `refused`: are told of every change of it.
        SetupError: the file cannot be used."""
        self._path, self._read, self._taken, self._refused = path, read, taken, refused
        self._seen = self._stamp()
        self.now = read(path) if path else otherwise

    async def watch(self) -> None:
        """Until cancelled."""
        while self._path:
            await asyncio.sleep(RELOAD_S)
            if (stamp := self._stamp()) != self._seen:
                self._seen = stamp
                self.reload()

    def reload(self) -> None:
        """What cannot be read changes nothing."""
        try:
            now = self._read(self._path)
            self._taken(now)
        except SetupError as error:
            _log.error("what the file said before holds on: %s", error)
            self._refused(str(error))
        except Exception as error:  # noqa: BLE001 (a file must not end the watch over it)
            _log.exception("what %s said before holds on", self._path)
            self._refused(f"{type(error).__name__}: {error}")
        else:
            self.now = now
            _log.info("%s was read again", self._path)

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_ino, found.st_size
