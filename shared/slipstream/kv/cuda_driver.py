"""The few calls of the CUDA runtime that we need. Not yet run on a GPU."""

import ctypes
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_NON_BLOCKING = 1
_LAZY_PEER_ACCESS = 1
_PORTABLE = 1
_DEFAULT = 4  # cudaMemcpyDefault: the pointers say on which side they are
HANDLE_BYTES = 64


class CudaError(Exception):
    """The runtime refused; one line."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _Attributes(ctypes.Structure):
    """cudaPointerAttributes as far as it is read; newer runtimes have more behind it."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "device")),
        ("rest", ctypes.c_char * 128),
    )


class CudaDriver:
    """On one GPU, with a stream of its own."""

    def __init__(self, index: int = 0) -> None:
        """CudaError: there is no CUDA here, or no such GPU."""
        self._runtime, self._index = _library(), index
        self._stream = ctypes.c_void_p()
        self._enter()
        call = self._runtime.cudaStreamCreateWithFlags
        self._check(call(ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING)))

    def reserve(self, num_bytes: int) -> int:
        """A new allocation of zeros; it lives as long as the process."""
        pointer, size = ctypes.c_void_p(), ctypes.c_size_t(num_bytes)
        self._enter()
        self._check(self._runtime.cudaMalloc(ctypes.byref(pointer), size))
        self._check(self._runtime.cudaMemsetAsync(pointer, ctypes.c_int(0), size, self._stream))
        self.wait()
        return int(pointer.value or 0)

    def allocate(self, content: bytes) -> int:
        """A new allocation that holds `content`; it lives as long as the process."""
        pointer = self.reserve(len(content))
        source = ctypes.create_string_buffer(content, len(content))
        self.copy(pointer, ctypes.addressof(source), len(content))
        self.wait()
        return pointer

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """New memory of the host that copies reach at full speed; it lives as long as the
        process."""
        pointer, size = ctypes.c_void_p(), ctypes.c_size_t(num_bytes)
        self._enter()
        call = self._runtime.cudaHostAlloc
        self._check(call(ctypes.byref(pointer), size, ctypes.c_uint(_PORTABLE)))
        memory = (ctypes.c_uint8 * num_bytes).from_address(int(pointer.value or 0))
        return np.ctypeslib.as_array(memory)

    def export(self, pointer: int) -> bytes:
        """The handle of the allocation that begins at `pointer`."""
        handle = _Handle()
        call = self._runtime.cudaIpcGetMemHandle
        self._enter()
        self._check(call(ctypes.byref(handle), ctypes.c_void_p(pointer)))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Maps another process's allocation of this host, of this GPU or another one."""
        pointer, given = ctypes.c_void_p(), _Handle.from_buffer_copy(handle)
        call = self._runtime.cudaIpcOpenMemHandle
        self._enter()
        self._check(call(ctypes.byref(pointer), given, ctypes.c_uint(_LAZY_PEER_ACCESS)))
        return int(pointer.value or 0)

    def shut(self, pointer: int) -> None:
        self._enter()
        self._check(self._runtime.cudaIpcCloseMemHandle(ctypes.c_void_p(pointer)))

    def gpu_of(self, pointer: int) -> int:
        """The GPU whose memory that is."""
        found = _Attributes()
        call = self._runtime.cudaPointerGetAttributes
        self._enter()
        self._check(call(ctypes.byref(found), ctypes.c_void_p(pointer)))
        return int(found.device)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Begins a copy on our stream; either side may be the host's."""
        to, size = ctypes.c_void_p(target), ctypes.c_size_t(num_bytes)
        call = self._runtime.cudaMemcpyAsync
        self._check(call(to, ctypes.c_void_p(source), size, _DEFAULT, self._stream))

    def wait(self) -> None:
        """Until all copies of our stream are done."""
        self._check(self._runtime.cudaStreamSynchronize(self._stream))

    def _enter(self) -> None:
        """Each thread has a current GPU of its own, the first one until it says otherwise."""
        self._check(self._runtime.cudaSetDevice(ctypes.c_int(self._index)))

    def _check(self, status: int) -> None:
        if status:
            text = self._runtime.cudaGetErrorString(status)
            raise CudaError(f"CUDA error {status}: {text.decode(errors='replace')}")


def count_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that a process may use, as far as can be seen without asking a driver."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    there = len([path for path in devices.glob("nvidia*") if path.name[6:].isdigit()])
    if visible is None or not there:
        return there
    return min(there, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))


def _library() -> ctypes.CDLL:
    """The system's, or that which came with torch; one that is loaded already is taken as it is."""
    for name in (*_NAMES, *_of_wheels()):
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        return runtime
    raise CudaError("no CUDA runtime (libcudart) is installed")


def _of_wheels() -> Iterator[str]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        yield from sorted(map(str, Path(folder).glob("*/lib/libcudart.so.*")), reverse=True)
