"""The few calls of the CUDA runtime that `cuda_ipc` needs. Not yet run on a GPU."""

import ctypes

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_LAZY_PEER_ACCESS = 1
_DEFAULT = 4  # cudaMemcpyDefault: the pointers say on which side they are
HANDLE_BYTES = 64


class CudaError(Exception):
    """The runtime refused; one line."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaDriver:
    """On the device that is current in this process, with a stream of its own."""

    def __init__(self) -> None:
        """CudaError: there is no CUDA here."""
        self._runtime = _library()
        self._stream = ctypes.c_void_p()
        self._check(self._runtime.cudaStreamCreateWithFlags(ctypes.byref(self._stream), 1))

    def allocate(self, content: bytes) -> int:
        """A new allocation that holds `content`; it lives as long as the process."""
        pointer = ctypes.c_void_p()
        self._check(self._runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(len(content))))
        source = ctypes.create_string_buffer(content, len(content))
        self.copy(int(pointer.value or 0), ctypes.addressof(source), len(content))
        self.wait()
        return int(pointer.value or 0)

    def export(self, pointer: int) -> bytes:
        """The handle of the allocation that begins at `pointer`."""
        handle = _Handle()
        call = self._runtime.cudaIpcGetMemHandle
        self._check(call(ctypes.byref(handle), ctypes.c_void_p(pointer)))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Maps another process's allocation of this host."""
        pointer, given = ctypes.c_void_p(), _Handle.from_buffer_copy(handle)
        call = self._runtime.cudaIpcOpenMemHandle
        self._check(call(ctypes.byref(pointer), given, ctypes.c_uint(_LAZY_PEER_ACCESS)))
        return int(pointer.value or 0)

    def shut(self, pointer: int) -> None:
        self._check(self._runtime.cudaIpcCloseMemHandle(ctypes.c_void_p(pointer)))

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Begins a copy on our stream; either side may be the host's."""
        to, size = ctypes.c_void_p(target), ctypes.c_size_t(num_bytes)
        call = self._runtime.cudaMemcpyAsync
        self._check(call(to, ctypes.c_void_p(source), size, _DEFAULT, self._stream))

    def wait(self) -> None:
        """Until all copies of our stream are done."""
        self._check(self._runtime.cudaStreamSynchronize(self._stream))

    def _check(self, status: int) -> None:
        if status:
            text = self._runtime.cudaGetErrorString(status)
            raise CudaError(f"CUDA error {status}: {text.decode(errors='replace')}")


def _library() -> ctypes.CDLL:
    for name in _NAMES:
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        return runtime
    raise CudaError("no CUDA runtime (libcudart) is installed")
