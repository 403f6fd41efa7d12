"""The few calls of NIXL that we need. All that knows its bindings is in this file.

The bindings rather than the wrapper around them, because the wrapper starts NIXL's progress thread
with no pause between two looks: it takes a core for itself, and READs over TCP are slower for it.
"""

import contextlib
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from slipstream.kv.segment import Blocks

PAUSE_US = 1
"""Between two looks of the progress thread; any pause lets it sleep until something comes."""
UCX_CONFIG = "TLS=^mm"
"""Unless `UCX_TLS` says otherwise. Without the transports over mapped memory, for there UCX ends
the source's process when a reader is killed in mid-READ; `cma` and `tcp` survive it."""
_PACKAGES = ("nixl_cu12", "nixl_cu13")


class NixlError(Exception):
    """NIXL refused, or the peer is gone; one line."""


class NixlAgent:
    """One agent with backend UCX. Not for several threads at a time."""

    def __init__(self, name: str):
        """NixlError: NIXL is not installed, or has no way to talk to anybody here."""
        self._nixl = _bindings()
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, PAUSE_US
        self._agent = self._call(self._nixl.nixlAgent, name, config)
        options = {"engine_config": UCX_CONFIG}
        self._backend = self._call(self._agent.createBackend, "UCX", options)

    def register(self, memory: Blocks) -> None:
        rows = [(memory.ctypes.data, memory.nbytes, 0, "")]
        descriptors = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, rows)
        self._call(self._agent.registerMem, descriptors, [self._backend])

    def metadata(self) -> bytes:
        """What a peer needs to read what has been registered so far."""
        return bytes(self._call(self._agent.getLocalMD))

    def add(self, metadata: bytes) -> str:
        """The name of the peer's agent."""
        name = self._call(self._agent.loadRemoteMD, metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove(self, name: str) -> None:
        self._call(self._agent.invalidateRemoteMD, name)

    def prepare(self, name: str, base: int, count: int, row_bytes: int) -> int:
        """A list of `count` adjacent blocks at an address of the agent `name`; empty: of ours."""
        rows = np.zeros((count, 3), np.uint64)
        rows[:, 0] = np.uint64(base) + np.arange(count, dtype=np.uint64) * np.uint64(row_bytes)
        rows[:, 1] = row_bytes
        descriptors = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, rows)
        return int(self._call(self._agent.prepXferDlist, name, descriptors, []))

    def release_list(self, handle: int) -> None:
        self._call(self._agent.releasedDlistH, handle)

    def post(self, ours: int, our_rows: Sequence[int], theirs: int, rows: Sequence[int]) -> int:
        """Begins a READ; its handle."""
        lists: tuple[object, ...] = (ours, list(our_rows), theirs, list(rows))
        operation = self._nixl.NIXL_READ
        handle = int(self._call(self._agent.makeXferReq, operation, *lists, "", [], False))
        try:
            self._call(self._agent.postXferReq, handle, "")
        except NixlError:
            self.release(handle)
            raise
        return handle

    def running(self, handle: int) -> bool:
        """False: all is there. NixlError: it failed."""
        state = self._call(self._agent.getXferStatus, handle)
        if state == self._nixl.NIXL_IN_PROG:
            return True
        if state != self._nixl.NIXL_SUCCESS:
            raise NixlError(str(state))
        return False

    def release(self, handle: int) -> None:
        """Only of a READ that has ended: NIXL also lets go of one that still writes."""
        with contextlib.suppress(NixlError):  # of a peer that is gone; it goes with the agent
            self._call(self._agent.releaseXferReq, handle)

    def close(self) -> None:
        """Ends all READs, ours and those of peers."""
        del self._agent

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 the bindings raise a class for each status
            raise NixlError(f"{type(error).__name__}: {error}") from None


def _bindings() -> ModuleType:
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._bindings")
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise NixlError(f"{package}: {error}") from None
    raise NixlError("not installed: pip install 'slipstream[nixl]'")
