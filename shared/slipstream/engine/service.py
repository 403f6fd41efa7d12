"""A worker process from its settings to its end: model, pool, transports, machine, shell."""

import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from slipstream import curve
from slipstream.config import SetupError, StartError, WorkerConfig, format_bytes
from slipstream.core.job import blocks_for
from slipstream.core.worker import WorkerMachine, WorkerSettings
from slipstream.core.worker_spans import WorkerSpans
from slipstream.engine.executor import WorkerExecutor
from slipstream.engine.kv_events import KvEventPublisher
from slipstream.engine.model_config import ModelConfig, ModelError
from slipstream.engine.offload import Offload
from slipstream.engine.runner import Runner
from slipstream.errors import ExitCode
from slipstream.kv.bus import bus_address
from slipstream.kv.choice import Transports
from slipstream.kv.layout import KvDtype, KvLayout
from slipstream.kv.offers import Pool, offer
from slipstream.kv.segment import (
    Segment,
    SegmentHeader,
    create_segment,
    free_bytes,
    remove_dead_segments,
    segment_path,
)
from slipstream.messages import NodeInfo, WorkerInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.log import set_up
from slipstream.runtime.memory import available_memory, require_host_tiers
from slipstream.runtime.priority import stand_back
from slipstream.runtime.shell import run_service
from slipstream.runtime.wall import wall_offset_ns
from slipstream.types import Epoch

MEMORY_SHARE = 0.125
SHM_SHARE = 0.5
USUAL_TOKENS = 1024
"""Tokens of a request that an unasked-for pool is sized for."""
_NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}

_LOG = logging.getLogger(__name__)


class _Plan(NamedTuple):
    """What the settings come to for this model on this machine."""

    model: ModelConfig
    dtype: KvDtype
    layout: KvLayout
    max_model_len: int
    num_blocks: int
    threads: int


def run_worker(config: WorkerConfig) -> int:
    """Runs a prefill or decode worker until it is drained; the exit code.

    StartError: the model cannot be served (4), settings contradict it (3), no memory (6), an
    address is taken (5).
    """
    set_up(config.log_level, config.node_id, config.log_json)
    stand_back(config.nice)
    signal.signal(signal.SIGTERM, _leave_in_order)
    remove_dead_segments(config.shm_dir, config.run_dir, config.node_id)
    try:
        plan = _plan(config, ModelConfig.read(config.model))
        with ExitStack() as stack:
            epoch = new_epoch(config)
            segment = _segment(config, plan, epoch)
            stack.callback(segment.close)
            transports = _transports(config, segment)
            stack.callback(transports.close)
            node = _node(config, plan, segment, transports)
            machine = WorkerMachine(node, _settings(config, plan.model))
            pool = torch.frombuffer(segment.blocks, dtype=getattr(torch, plan.layout.dtype))
            shape = (plan.num_blocks, *plan.layout.block_shape)
            runner = _runner(config, plan, pool.view(shape))
            runner.prepare(config.max_num_seqs)
            _announce(config, plan, segment, transports)
            kv_events = _kv_events(config, node)
            if kv_events is not None:
                stack.callback(kv_events.close)
            executor = WorkerExecutor(
                *(runner, segment.blocks, transports, lambda: machine.membership.nodes),
                offload=_offload(config, segment),
                kv_events=kv_events,
            )
            spans = WorkerSpans(node, wall_offset_ns, machine.batcher)
            return run_service(config, node, machine, executor, spans=spans)
    except ModelError as error:
        raise StartError(f"slipstream {config.role}: {error}", ExitCode.MODEL) from None


def _runner(config: WorkerConfig, plan: _Plan, pool: torch.Tensor) -> Runner:
    return Runner(
        *(config.model, plan.dtype, pool, plan.threads),
        quantization=config.quantization,
        packed_dir=None if config.packed_weights_dir == "none" else Path(config.packed_weights_dir),
    )


def _leave_in_order(number: int, _frame: object) -> None:
    """Until the shell listens to signals: what is made so far goes with us."""
    raise SystemExit(128 + number)


def choose_dtype(wanted: str, checkpoint: str, cpu_flags: frozenset[str]) -> KvDtype:
    """`auto`: bfloat16 for a half-precision checkpoint, where the CPU computes with it natively."""
    if wanted != "auto":
        return "bfloat16" if wanted == "bfloat16" else "float32"
    half = checkpoint in ("bfloat16", "float16")
    return "bfloat16" if half and cpu_flags & _NATIVE_BFLOAT16 else "float32"


def choose_model_len(config: WorkerConfig, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if config.max_model_len > longest:
        raise SetupError(
            f"slipstream {config.role}: --max-model-len {config.max_model_len}: "
            f"the model has {longest}; give that or less"
        )
    return config.max_model_len or longest


def choose_num_blocks(
    config: WorkerConfig, block_bytes: int, max_model_len: int, memory_free: int, shm_free: int
) -> int:
    """Blocks of the pool; at least one request of `max_model_len` fits. StartError if it cannot.

    `memory_free`, `shm_free`: bytes that nobody uses on this host, in the segments' folder.
    """
    needed = blocks_for(max_model_len)
    if config.kv_cache_bytes:
        num_blocks = config.kv_cache_bytes // block_bytes
        why = f"--kv-cache-bytes {format_bytes(config.kv_cache_bytes)}"
    else:
        limit = min(int(memory_free * MEMORY_SHARE), int(shm_free * SHM_SHARE))
        usual = blocks_for(min(USUAL_TOKENS, max_model_len)) * config.max_num_seqs
        num_blocks = min(max(usual, needed), limit // block_bytes)
        why = (
            f"{format_bytes(limit)} for KV blocks (sized automatically: an eighth of "
            f"{format_bytes(memory_free)} free memory, half of {format_bytes(shm_free)} free in "
            f"{config.shm_dir})"
        )
    if num_blocks < needed:
        raise StartError(
            f"slipstream {config.role}: {why} is too little: one request of {max_model_len} tokens "
            f"needs {format_bytes(needed * block_bytes)}; lower --max-model-len or raise "
            "--kv-cache-bytes",
            ExitCode.MEMORY,
        )
    return num_blocks


def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _plan(config: WorkerConfig, model: ModelConfig) -> _Plan:
    dtype = choose_dtype(config.dtype, model.dtype, _cpu_flags())
    layout = model.kv_layout("float8_e4m3fn" if config.kv_cache_dtype == "fp8" else dtype)
    max_model_len = choose_model_len(config, model)
    try:
        shm_free = free_bytes(config.shm_dir)
    except OSError as error:
        line = f"slipstream {config.role}: --shm-dir {config.shm_dir}: {error.strerror}"
        raise SetupError(line) from None
    memory_free = available_memory()
    num_blocks = choose_num_blocks(config, layout.block_bytes, max_model_len, memory_free, shm_free)
    pool_bytes, who = num_blocks * layout.block_bytes, f"slipstream {config.role}"
    require_host_tiers(who, [config.offload_host_bytes], [pool_bytes], memory_free)
    threads = config.threads or len(os.sched_getaffinity(0))
    return _Plan(model, dtype, layout, max_model_len, num_blocks, threads)


def _segment(config: WorkerConfig, plan: _Plan, epoch: Epoch) -> Segment:
    header = SegmentHeader(
        kv_layout_id=plan.layout.layout_id(plan.model.fingerprint, config.quantization, plan.dtype),
        epoch=epoch,
        num_blocks=plan.num_blocks,
        block_bytes=plan.layout.block_bytes,
    )
    path = segment_path(config.shm_dir, config.run_dir, config.node_id, epoch)
    return create_segment(path, header)


def _offload(config: WorkerConfig, segment: Segment) -> Offload | None:
    """What is below the pool, if the settings give it room."""
    if not config.offloads:
        return None
    folder = Path(config.offload_dir) / config.node_id if config.offload_dir else None
    block_bytes = segment.header.block_bytes
    for flag, wanted in (
        ("--offload-host-bytes", config.offload_host_bytes),
        ("--offload-disk-bytes", config.offload_disk_bytes),
    ):
        if 0 < wanted < block_bytes:
            raise SetupError(
                f"slipstream {config.role}: {flag} {format_bytes(wanted)} is less than one block "
                f"({format_bytes(block_bytes)}); give more, or 0"
            )
    offload = Offload(
        segment.blocks,
        segment.header.kv_layout_id,
        folder=folder,
        host_bytes=config.offload_host_bytes,
        disk_bytes=config.offload_disk_bytes,
    )
    _LOG.info(
        "tiers below the pool: %s of host memory, %s in %s; saved after %d hits",
        format_bytes(config.offload_host_bytes),
        format_bytes(config.offload_disk_bytes),
        folder or "no folder",
        config.offload_after_hits,
    )
    return offload


def _transports(config: WorkerConfig, segment: Segment) -> Transports:
    bind = bus_address(config.listen, config.run_dir, config.node_id)
    keys = curve.load(config.keys_dir, config.role)
    pool = Pool(segment, config.node_id, bind, config.advertise, keys=keys)
    transports, absent = offer(config.transports, pool)
    header, host = segment.header, host_identity(config.shm_dir)
    return Transports(transports, header.kv_layout_id, header.block_bytes, host, absent)


def _node(config: WorkerConfig, plan: _Plan, segment: Segment, transports: Transports) -> NodeInfo:
    return NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=segment.header.epoch,
        address=config.advertise,
        host=host_identity(config.shm_dir),
        worker=WorkerInfo(
            model=config.served_model_name or Path(config.model).resolve().name,
            kv_layout_id=segment.header.kv_layout_id,
            num_blocks=plan.num_blocks,
            block_bytes=plan.layout.block_bytes,
            max_model_len=plan.max_model_len,
            vocab_size=plan.model.vocab_size,
            max_num_seqs=config.max_num_seqs,
            prefill_budget_tokens=config.prefill_budget_tokens,
            accept_decode=config.accept_decode,
            transports=transports.advertise(),
            quantization=config.quantization,
            device=_device(plan.threads),
        ),
    )


def _kv_events(config: WorkerConfig, node: NodeInfo) -> KvEventPublisher | None:
    if not config.kv_events_endpoint:
        return None
    assert node.worker is not None
    topic = f"kv@{node.node_id}@{node.worker.model}"  # as llm-d reads it
    return KvEventPublisher(
        *(config.kv_events_endpoint, config.kv_events_replay_endpoint, topic),
        config.kv_events_format,
    )


def _device(threads: int) -> str:
    """Named if it takes all of its cores: whoever has the same ones competes for them."""
    cores = sorted(os.sched_getaffinity(0))
    return f"cpu {','.join(map(str, cores))}" if threads >= len(cores) else ""


def _computes_with(threads: int) -> str:
    """For the log."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    how = "all" if _device(threads) else "any"
    return f"{threads} thread{'s' * (threads > 1)} on {how} of the cores {cores}"


def _settings(config: WorkerConfig, model: ModelConfig) -> WorkerSettings:
    return WorkerSettings(
        eos_token_ids=tuple(sorted(model.eos_token_ids)),
        lease_s=config.lease_s,
        renew_s=config.renew_s,
        pull_timeout_s=config.pull_timeout_s,
        step_timeout_s=config.step_timeout_s,
        enable_prefix_caching=config.enable_prefix_caching,
        offload_after_hits=config.offload_after_hits if config.offloads else None,
        kv_events=bool(config.kv_events_endpoint),
        steps_in_flight=2 if config.overlap else 1,
        draft_tokens=int(config.speculative.removeprefix("ngram:") or 0),
    )


def _announce(config: WorkerConfig, plan: _Plan, segment: Segment, transports: Transports) -> None:
    _LOG.info(
        "model %s, %s%s, context %d, %d KV blocks of %s (%s in %s), transports %s, %s",
        config.model,
        plan.dtype,
        "" if config.quantization == "none" else f", {config.quantization} weights",
        plan.max_model_len,
        plan.num_blocks,
        format_bytes(plan.layout.block_bytes),
        format_bytes(segment.header.file_bytes),
        segment.pages,
        ",".join(transports.advertise()),
        _computes_with(plan.threads),
    )
    for name, reason in transports.absent.items():
        _LOG.info("no transport %s: %s", name, reason)
