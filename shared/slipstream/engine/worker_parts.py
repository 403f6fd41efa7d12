"""What every rank of a worker is made of: model, pool, transports, on its own device."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream import curve
from slipstream.config import SetupError, WorkerConfig, format_bytes
from slipstream.core.batching import SCORED_TOKENS_MAX
from slipstream.core.job import blocks_for
from slipstream.core.machine import Row
from slipstream.engine import gpu
from slipstream.engine.backends import weights_word
from slipstream.engine.lora import LoraLimits
from slipstream.engine.model_config import ServedModel
from slipstream.engine.ranks import Ranks
from slipstream.engine.runner import Runner, Tell
from slipstream.engine.sizing import Room, choose_dtype, choose_model_len, host_room
from slipstream.kv.bus import bus_address
from slipstream.kv.choice import Transports
from slipstream.kv.device import DeviceSegment
from slipstream.kv.layout import KvDtype, KvLayout
from slipstream.kv.offers import Pool, offer
from slipstream.kv.segment import Segment, SegmentHeader, create_segment, free_bytes, segment_path
from slipstream.runtime.identity import host_identity
from slipstream.runtime.memory import available_memory
from slipstream.types import BLOCK_TOKENS, Epoch


class WorkerPlan(NamedTuple):
    """What the settings come to for this model on this machine, before anything is loaded."""

    model: ServedModel
    device: torch.device
    share: int
    """Bytes of its GPU that this rank may fill; 0 on a CPU."""
    dtype: KvDtype
    layout: KvLayout
    """Of this rank's part of a block."""
    max_model_len: int
    threads: int
    weights: str
    """See `weights_word`."""


def plan_of(config: WorkerConfig, model: ServedModel, rank: int = 0) -> WorkerPlan:
    """StartError, ModelError: they come to nothing."""
    device = gpu.choose_device(config, rank)
    on_gpu = device.type == "cuda"
    share = gpu.share_of(config, device) if on_gpu else 0
    dtype = choose_dtype(config.dtype, model.dtype, _cpu_flags(), on_gpu)
    kept: KvDtype = "float8_e4m3fn" if config.kv_cache_dtype == "fp8" else dtype
    layout = model.part(config.tensor_parallel_size).kv_layout(kept)
    threads = config.threads or len(os.sched_getaffinity(0))
    return WorkerPlan(
        *(model, device, share, dtype, layout, choose_model_len(config, model), threads),
        weights_word(model, config.quantization, device),
    )


def load_runner(
    config: WorkerConfig,
    plan: WorkerPlan,
    pool: Tensor | torch.device,
    ranks: Ranks | None = None,
    tell: Tell = lambda sizes: None,
) -> Runner:
    """`pool`: or the device where there will be one."""
    return Runner(
        *(config.model, plan.dtype, pool, plan.threads),
        quantization=config.quantization,
        packed_dir=None if config.packed_weights_dir == "none" else Path(config.packed_weights_dir),
        dummy=config.load_format == "dummy",
        ranks=ranks,
        tell=tell,
        config=plan.model,
        kv_dtype=plan.layout.dtype,
        lora=LoraLimits(config.max_loras, config.max_lora_rank, config.lora_bytes, config.lora_dir),
    )


def room_of(config: WorkerConfig, plan: WorkerPlan, runner: Runner | None) -> Room:
    """For this rank's pool. `runner`: with the model, where its device has to be measured."""
    if plan.share:
        assert runner is not None
        gpu.forget_peak(plan.device)
        runner.rehearse(largest_step(config))
        return gpu.measured_room(config, plan.device, plan.share)
    try:
        shm_free = free_bytes(config.shm_dir)
    except OSError as error:
        line = f"slipstream {config.role}: --shm-dir {config.shm_dir}: {error.strerror}"
        raise SetupError(line) from None
    parts = config.tensor_parallel_size
    return host_room(config, available_memory() // parts, shm_free // parts)


def largest_step(config: WorkerConfig) -> list[Row]:
    """A prompt of all that a step may compute, scored as far as it may be, and as many streams as
    there may be."""
    tokens = max(config.prefill_budget_tokens, BLOCK_TOKENS)
    scored = min(tokens, SCORED_TOKENS_MAX) - 1
    blocks = tuple(range(blocks_for(tokens)))
    prompt = Row("prompt", 1, (0,) * tokens, 0, blocks, True, prompt_logprobs=scored)
    streams = (Row(f"stream-{i}", 1, (0,), 0, (0,), True) for i in range(config.max_num_seqs))
    return [prompt, *streams]


def make_pool(
    config: WorkerConfig, plan: WorkerPlan, epoch: Epoch, num_blocks: int
) -> Segment | DeviceSegment:
    """StartError: there is no room for it."""
    header = SegmentHeader(
        kv_layout_id=plan.layout.layout_id(
            *(plan.model.fingerprint, plan.weights, config.tensor_parallel_size),
            computed_in=plan.dtype,
        ),
        epoch=epoch,
        num_blocks=num_blocks,
        block_bytes=plan.layout.block_bytes,
    )
    if plan.share:
        return gpu.device_segment(config, header, plan.device)
    return create_segment(
        segment_path(config.shm_dir, config.run_dir, config.node_id, epoch), header
    )


def pool_tensor(plan: WorkerPlan, segment: Segment | DeviceSegment) -> Tensor:
    """The pool's memory as the runner has it."""
    dtype: torch.dtype = getattr(torch, plan.layout.dtype)
    if isinstance(segment, DeviceSegment):
        flat = gpu.tensor_of(segment.blocks).view(-1).view(dtype)
    else:
        flat = torch.frombuffer(segment.blocks, dtype=dtype)
    return flat.view(segment.header.num_blocks, *plan.layout.block_shape)


def make_transports(config: WorkerConfig, segment: Segment | DeviceSegment) -> Transports:
    bind = bus_address(config.listen, config.run_dir, config.node_id)
    keys, host = curve.load(config.keys_dir, config.role), host_identity(config.shm_dir)
    pool = Pool(segment, config.node_id, bind, config.advertise, host, keys)
    transports, absent = offer(config.transports, pool)
    header = segment.header
    scratch = segment.scratch if isinstance(segment, DeviceSegment) else None
    return Transports(*(transports, header.kv_layout_id, header.block_bytes, host, absent, scratch))


def what_computes(plan: WorkerPlan) -> str:
    """Named if it takes all of it: whoever has the same competes for it."""
    if plan.share:
        return f"cuda {plan.device.index}"
    cores = sorted(os.sched_getaffinity(0))
    return f"cpu {','.join(map(str, cores))}" if plan.threads >= len(cores) else ""


def computes_with(plan: WorkerPlan) -> str:
    """For the log."""
    if plan.share:
        name = torch.cuda.get_device_name(plan.device)
        return f"{name} ({plan.device}), of which {format_bytes(plan.share)} may be filled"
    threads, cores = plan.threads, ",".join(map(str, sorted(os.sched_getaffinity(0))))
    how = "all" if what_computes(plan) else "any"
    return f"{threads} thread{'s' * (threads > 1)} on {how} of the cores {cores}"


def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
