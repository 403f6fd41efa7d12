"""A worker's GPU: which one, what is free there, and a pool that torch and peers both reach."""

from typing import Any

import torch
from torch import Tensor

from slipstream.config import SetupError, StartError, WorkerConfig
from slipstream.engine.sizing import Room, gpu_room, gpu_share
from slipstream.errors import ExitCode
from slipstream.kv.choice import PROBE_BYTES
from slipstream.kv.cuda_driver import CudaError
from slipstream.kv.device import DeviceSegment, create_device_segment
from slipstream.kv.segment import SegmentHeader


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


def measured_room(config: WorkerConfig, device: torch.device, share: int) -> Room:
    """After the largest step has been run once."""
    torch.cuda.synchronize(device)
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
        return create_device_segment(header, device.index, PROBE_BYTES)
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


def tensor_of(segment: DeviceSegment, device: torch.device) -> Tensor:
    """All of its blocks, uint8 `[num_blocks * block_bytes]`: the same memory."""
    count, size = segment.blocks.shape
    return torch.as_tensor(_Memory(segment.blocks.pointer, count * size), device=device)
