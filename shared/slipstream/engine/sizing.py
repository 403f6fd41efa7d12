"""How much of a model fits: dtype, context, blocks of the pool. Pure: what is free is told."""

from typing import NamedTuple

from slipstream.config import SetupError, StartError, WorkerConfig, format_bytes
from slipstream.core.job import blocks_for
from slipstream.engine.model_config import ServedModel
from slipstream.errors import ExitCode
from slipstream.kv.layout import KvDtype
from slipstream.types import BLOCK_TOKENS

MEMORY_SHARE = 0.125
SHM_SHARE = 0.5
GPU_SHARE = 0.9
GPU_OTHER_BYTES = 1 << 30
"""Of a worker's share of its GPU: what is not torch's: CUDA's context, its libraries, graphs."""
USUAL_TOKENS = 1024
"""Tokens of a request that an unasked-for pool is sized for."""
_NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


class Room(NamedTuple):
    """What a pool that nobody asked for may take."""

    num_bytes: int
    why: str
    """For the line that refuses: `an eighth of 8GiB free memory`."""
    usual: bool = False
    """Take no more of it than requests of the usual length can use."""


class Size(NamedTuple):
    num_blocks: int
    max_model_len: int
    lowered_from: int = 0
    """What the model has, where the pool does not hold that much and nobody asked for it."""


def choose_dtype(
    wanted: str, checkpoint: str, cpu_flags: frozenset[str], on_gpu: bool = False
) -> KvDtype:
    """`auto`: bfloat16 for a half-precision checkpoint, on a GPU, or where the CPU computes with it
    natively."""
    if wanted != "auto":
        return "bfloat16" if wanted == "bfloat16" else "float32"
    half = checkpoint in ("bfloat16", "float16")
    return "bfloat16" if half and (on_gpu or cpu_flags & _NATIVE_BFLOAT16) else "float32"


def choose_model_len(config: WorkerConfig, model: ServedModel) -> int:
    longest = model.max_position_embeddings
    if config.max_model_len > longest:
        raise SetupError(
            f"slipstream {config.role}: --max-model-len {config.max_model_len}: "
            f"the model has {longest}; give that or less"
        )
    return config.max_model_len or longest


def host_room(config: WorkerConfig, memory_free: int, shm_free: int) -> Room:
    """`memory_free`, `shm_free`: bytes that nobody uses on this host, in the segments' folder."""
    limit = min(int(memory_free * MEMORY_SHARE), int(shm_free * SHM_SHARE))
    why = (
        f"{format_bytes(limit)} for KV blocks (sized automatically: an eighth of "
        f"{format_bytes(memory_free)} free memory, half of {format_bytes(shm_free)} free in "
        f"{config.shm_dir})"
    )
    return Room(limit, why, usual=True)


def gpu_share(config: WorkerConfig, device: str, free: int, total: int) -> int:
    """Bytes of its GPU that the worker may fill. StartError: they are not there."""
    share = config.gpu_memory_share or GPU_SHARE
    wanted = int(share * total)
    if wanted > free:
        raise StartError(
            f"slipstream {config.role}: {device} has {format_bytes(free)} free of "
            f"{format_bytes(total)}, --gpu-memory-share {share:g} asks for {format_bytes(wanted)}; "
            f"give {int(free / total * 100) / 100:g} or less, or end what else runs there",
            ExitCode.MEMORY,
        )
    return wanted


def gpu_room(config: WorkerConfig, device: str, share: int, peak: int) -> Room:
    """`share`: as `gpu_share` has it. `peak`: bytes that torch held at most, weights and all, in
    the largest step."""
    adapters = config.lora_bytes if config.max_loras else 0
    limit = max(0, share - peak - adapters - GPU_OTHER_BYTES)
    why = (
        f"{format_bytes(limit)} of {device} for KV blocks (--gpu-memory-share: "
        f"{format_bytes(share)}, less {format_bytes(peak)} for weights and the largest step, "
        f"{format_bytes(adapters)} for LoRA adapters, {format_bytes(GPU_OTHER_BYTES)} for CUDA "
        "itself)"
    )
    return Room(limit, why)


def size_pool(config: WorkerConfig, block_bytes: int, max_model_len: int, room: Room) -> Size:
    """Blocks of the pool; one request of `max_model_len` fits. If it does not, and nobody asked for
    that length, the length is what fits. StartError: too little for that too."""
    needed = blocks_for(max_model_len)
    if config.kv_cache_bytes:
        num_blocks = config.kv_cache_bytes // block_bytes
        why = f"--kv-cache-bytes {format_bytes(config.kv_cache_bytes)}"
    else:
        num_blocks, why = room.num_bytes // block_bytes, room.why
        if room.usual:
            usual = blocks_for(min(USUAL_TOKENS, max_model_len)) * config.max_num_seqs
            num_blocks = min(max(usual, needed), num_blocks)
    if num_blocks >= needed:
        return Size(num_blocks, max_model_len)
    if num_blocks and not config.max_model_len:
        return Size(num_blocks, num_blocks * BLOCK_TOKENS, lowered_from=max_model_len)
    raise StartError(
        f"slipstream {config.role}: {why} is too little: one request of "
        f"{max_model_len if config.max_model_len else BLOCK_TOKENS} tokens needs "
        f"{format_bytes((needed if config.max_model_len else 1) * block_bytes)}; "
        f"{'lower --max-model-len or ' if config.max_model_len else ''}raise --kv-cache-bytes",
        ExitCode.MEMORY,
    )
