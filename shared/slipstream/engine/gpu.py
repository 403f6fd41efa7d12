"""A worker's GPU: which one, what is free there, and a pool that torch and peers both reach."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from slipstream.config import SetupError, StartError, WorkerConfig
from slipstream.engine.sizing import Room, gpu_room, gpu_share
from slipstream.errors import ExitCode
from slipstream.kv.choice import PROBE_BYTES
from slipstream.kv.cuda_driver import CudaError
from slipstream.kv.device import DeviceBlocks, DeviceSegment, Kernels, create_device_segment
from slipstream.kv.segment import SegmentHeader

_LOG = logging.getLogger(__name__)


def choose_device(config: WorkerConfig, rank: int = 0) -> torch.device:
    """Of one rank: the GPUs follow each other. SetupError: there is no such GPU."""
    kind, _, first = config.device.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    index = int(first or 0) + rank
    if index >= count:
        parallel = config.tensor_parallel_size
        ranks = f" with --tensor-parallel-size {parallel}" if parallel > 1 else ""
        raise SetupError(
            f"slipstream {config.role}: --device {config.device}{ranks}: torch sees "
            f"{count or 'no'} GPU{'s' * (count != 1)}; give "
            f"{f'a number below {count}' if count else 'cpu, or see what slipstream doctor says'}"
        )
    return torch.device("cuda", index)


def share_of(config: WorkerConfig, device: torch.device) -> int:
    """Bytes that this worker may fill, held against what is free now: before it takes any."""
    free, total = torch.cuda.mem_get_info(device)
    return gpu_share(config, str(device), free, total)


def forget_peak(device: torch.device) -> None:
    """What making the weights took for a while."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def measured_room(config: WorkerConfig, device: torch.device, share: int) -> Room:
    """After the largest step has been run once."""
    peak = torch.cuda.max_memory_reserved(device)
    room = gpu_room(config, str(device), share, peak)
    if config.kv_cache_bytes > room.num_bytes:
        raise StartError(
            f"slipstream {config.role}: --kv-cache-bytes is more than {room.why}; lower it",
            ExitCode.MEMORY,
        )
    return room


def device_segment(
    config: WorkerConfig, header: SegmentHeader, device: torch.device
) -> DeviceSegment:
    """StartError: the memory is not there any more."""
    torch.cuda.empty_cache()
    try:
        return create_device_segment(header, device.index, PROBE_BYTES, block_kernels(device))
    except CudaError as error:
        raise StartError(
            f"slipstream {config.role}: no KV pool on {device}: {error}; lower --gpu-memory-share "
            "or --kv-cache-bytes",
            ExitCode.MEMORY,
        ) from None


class _Memory:
    """What torch asks of memory that is not its own."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def tensor_of(blocks: DeviceBlocks) -> Tensor:
    """uint8 `[num_blocks, block_bytes]`: the same memory."""
    return _tensor(blocks.pointer, *blocks.shape, blocks.gpu)


def _tensor(pointer: int, count: int, size: int, gpu: int) -> Tensor:
    """`gpu`: whose memory it is; on any other one it would be a copy."""
    device = torch.device("cuda", gpu)
    return torch.as_tensor(_Memory(pointer, count * size), device=device).view(count, size)


def block_kernels(device: torch.device) -> Kernels | None:
    """None: blocks are copied by the driver, and digested on the host."""
    try:
        # Imported here: who computes on a CPU needs no Triton.
        return BlockKernels(device, import_module("slipstream.kernels.gpu.blocks"))
    except ImportError as error:
        _LOG.warning("SLOW: KV blocks are digested on the host: %s", error)
        return None


class BlockKernels:
    """On a stream of each thread's own, so that no READ stands behind a step. Any thread."""

    def __init__(self, device: torch.device, made: Any) -> None:
        """`made`: the module with `verified_copy` and `digests` of rows of uint8 tensors."""
        self._device, self._made = device, made
        self._of_thread = threading.local()

    def copy(
        self,
        source: int,
        count: int,
        source_rows: Sequence[int],
        into: DeviceBlocks,
        rows: Sequence[int],
        digest: bool,
    ) -> tuple[bytes, ...]:
        with self._stream() as stream:
            theirs = _tensor(source, count, into.shape[1], into.gpu)
            given = list(source_rows), tensor_of(into), list(rows)
            words = self._made.verified_copy(theirs, *given, digest)
            stream.synchronize()
            return self._made.digest_bytes(words) if digest else ()

    def digests(self, blocks: DeviceBlocks, rows: Sequence[int]) -> tuple[bytes, ...]:
        with self._stream():
            made: tuple[bytes, ...] = self._made.digests(tensor_of(blocks), list(rows))
            return made

    @contextmanager
    def _stream(self) -> Iterator[Any]:
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._of_thread.stream):
                yield self._of_thread.stream
        except RuntimeError as error:
            raise CudaError(" ".join(str(error).split())[:300]) from error
