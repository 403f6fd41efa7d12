"""The few calls of NIXL that we need. All that knows its bindings is in this file.

The bindings rather than the wrapper around them, because the wrapper starts NIXL's progress thread
with no pause between two looks: it takes a core for itself, and READs over TCP are slower for it.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from slipstream.kv.segment import Blocks

PAUSE_US = 100_000
"""Between two looks of the progress thread, where nothing wakes it. To NIXL a pause of 1 us is one
of 1 ms: 850 times a second it took a core from somebody, for 20 ms in all."""
UCX_CONFIG = "TLS=^mm"
"""Unless `UCX_TLS` says otherwise. Without the transports over mapped memory, for there UCX ends
the source's process when a reader is killed in mid-READ; `cma` and `tcp` survive it."""
_PACKAGES = ("nixl_cu12", "nixl_cu13")


NOT_INSTALLED = "not installed: pip install 'slipstream[nixl]'"


class NixlError(Exception):
    """NIXL refused, or the peer is gone; one line."""


class NixlAgent:
    """What is read here; backend UCX. Not for several threads at a time.

    Two agents of NIXL. Peers need one with a progress thread. That thread wakes with every READ
    that is posted and spins until the post is over, which with `cma` is the READ itself: on a busy
    machine it had as much of a core as the READs. So ours are by an agent that has none.
    """

    def __init__(self, name: str):
        """NixlError: NIXL is not installed, or has no way to talk to anybody here."""
        self._nixl, self._name = _bindings(), name
        self._agent, self._backend = _create(self._nixl, name, progress=True)

    def serve(self, base: int, num_bytes: int, gpu: int | None = None) -> None:
        """Peers may read these bytes of the host's memory, or of a GPU's."""
        region = _region(self._nixl, base, num_bytes, gpu)
        _call(self._agent.registerMem, region, [self._backend])

    def metadata(self) -> bytes:
        """What a peer needs to read what is served so far."""
        return bytes(_call(self._agent.getLocalMD))

    def reader(self) -> "NixlReader":
        """A new one, that knows nobody. NixlError."""
        return NixlReader(self._nixl, f"{self._name}/reader")

    def close(self) -> None:
        """Ends the READs of peers."""
        del self._agent


class NixlReader:
    """What we read, and from whom. Not for several threads at a time."""

    def __init__(self, nixl: ModuleType, name: str):
        self._nixl = nixl
        self._agent, self._backend = _create(nixl, name, progress=False)

    def register(self, memory: Blocks) -> None:
        """READs may write to it."""
        region = _region(self._nixl, memory.ctypes.data, memory.nbytes, None)
        _call(self._agent.registerMem, region, [self._backend])

    def add(self, metadata: bytes) -> str:
        """The name of the peer's agent."""
        name = _call(self._agent.loadRemoteMD, metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove(self, name: str) -> None:
        _call(self._agent.invalidateRemoteMD, name)

    def prepare(
        self, name: str, base: int, count: int, row_bytes: int, gpu: int | None = None
    ) -> int:
        """A list of `count` adjacent blocks at an address of the agent `name`; empty: of ours.

        NixlError: some of them are in no memory that the agent has registered.
        """
        rows = np.zeros((count, 3), np.uint64)
        rows[:, 0] = np.uint64(base) + np.arange(count, dtype=np.uint64) * np.uint64(row_bytes)
        rows[:, 1], rows[:, 2] = row_bytes, gpu or 0
        descriptors = self._nixl.nixlXferDList(_kind(self._nixl, gpu), rows)
        return int(_call(self._agent.prepXferDlist, name, descriptors, []))

    def release_list(self, handle: int) -> None:
        _call(self._agent.releasedDlistH, handle)

    def post(self, ours: int, our_rows: Sequence[int], theirs: int, rows: Sequence[int]) -> int:
        """Begins a READ; its handle."""
        lists: tuple[object, ...] = (ours, list(our_rows), theirs, list(rows))
        operation = self._nixl.NIXL_READ
        handle = int(_call(self._agent.makeXferReq, operation, *lists, "", [], False))
        try:
            _call(self._agent.postXferReq, handle, "")
        except NixlError:
            self.release(handle)
            raise
        return handle

    def running(self, handle: int) -> bool:
        """False: all is there. NixlError: it failed."""
        state = _call(self._agent.getXferStatus, handle)
        if state == self._nixl.NIXL_IN_PROG:
            return True
        if state != self._nixl.NIXL_SUCCESS:
            raise NixlError(str(state))
        return False

    def release(self, handle: int) -> None:
        """Only of a READ that has ended: NIXL also lets go of one that still writes."""
        with contextlib.suppress(NixlError):  # of a peer that is gone; it goes with the agent
            _call(self._agent.releaseXferReq, handle)

    def close(self) -> None:
        """Ends all READs: from here on they write nowhere."""
        del self._agent


def _create(nixl: ModuleType, name: str, progress: bool) -> tuple[Any, Any]:
    config = nixl.nixlAgentConfig()
    config.useProgThread, config.pthrDelay = progress, PAUSE_US
    agent = _call(nixl.nixlAgent, name, config)
    return agent, _call(agent.createBackend, "UCX", {"engine_config": UCX_CONFIG})


def _region(nixl: ModuleType, base: int, num_bytes: int, gpu: int | None) -> Any:
    return nixl.nixlRegDList(_kind(nixl, gpu), [(base, num_bytes, gpu or 0, "")])


def _kind(nixl: ModuleType, gpu: int | None) -> Any:
    return nixl.DRAM_SEG if gpu is None else nixl.VRAM_SEG


def _call(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 the bindings raise a class for each status
        del function  # with its agent, which would live beyond its `close` in the error's traceback
        raise NixlError(f"{type(error).__name__}: {error}") from None


def nixl_installed() -> bool:
    """Whether the package is there. It is not loaded, and may still find no way to talk."""
    return any(importlib.util.find_spec(package) for package in _PACKAGES)


def _bindings() -> ModuleType:
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._bindings")
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise NixlError(f"{package}: {error}") from None
    raise NixlError(NOT_INSTALLED)
