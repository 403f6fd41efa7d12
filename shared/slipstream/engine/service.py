"""A worker process from its settings to its end: model, pool, transports, machine, shell."""

import logging
import signal
from contextlib import ExitStack
from pathlib import Path

from slipstream.config import SetupError, StartError, WorkerConfig, format_bytes
from slipstream.config.lora import lora_modules
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_settings import WorkerSettings
from slipstream.core.worker_spans import WorkerSpans
from slipstream.engine.adapters import AdapterBook
from slipstream.engine.executor import WorkerExecutor
from slipstream.engine.kv_events import KvEventPublisher
from slipstream.engine.model_config import ForeignModel, ModelError, ServedModel
from slipstream.engine.models import read_model
from slipstream.engine.offload import Offload
from slipstream.engine.ranks import Ranks
from slipstream.engine.runner import Runner, Tell
from slipstream.engine.sizing import Size, size_pool
from slipstream.engine.team import Team, end_worker
from slipstream.engine.worker_parts import (
    WorkerPlan,
    computes_with,
    load_runner,
    make_pool,
    make_transports,
    plan_of,
    pool_tensor,
    room_of,
    what_computes,
)
from slipstream.errors import ExitCode
from slipstream.kv.choice import Transports
from slipstream.kv.device import DeviceSegment
from slipstream.kv.segment import Segment, remove_dead_segments
from slipstream.messages import AdapterInfo, NodeInfo, WorkerInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.log import set_up
from slipstream.runtime.memory import available_memory, require_host_tiers
from slipstream.runtime.priority import stand_back
from slipstream.runtime.shell import run_service
from slipstream.runtime.wall import wall_offset_ns

_LOG = logging.getLogger(__name__)


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
        plan = plan_of(
            config, read_model(config.model, config.model_impl, config.load_format == "dummy")
        )
        with ExitStack() as stack:
            epoch = new_epoch(config)
            runner, team = None, None
            if config.tensor_parallel_size > 1:
                team = Team(config, epoch, plan.device, end_worker)
                stack.callback(team.close)
            if plan.share or team is not None:  # what is left shows when the model is there
                runner = load_runner(config, plan, plan.device, *_ways_to(team))
            size = _size(config, plan, runner, team)
            segment = make_pool(config, plan, epoch, size.num_blocks)
            stack.callback(segment.close)
            transports = make_transports(config, segment)
            stack.callback(transports.close)
            rank_transports = team.make_pools(size.num_blocks) if team is not None else ()
            pool = pool_tensor(plan, segment)
            if runner is None:
                runner = load_runner(config, plan, pool)
            else:
                runner.attach(pool)
                runner.prepare(config.max_num_seqs)
            adapters = _load_adapters(config, runner.adapters)
            node = _node(config, plan, size, segment, transports, rank_transports, adapters)
            machine = WorkerMachine(node, _settings(config, plan.model))
            _announce(config, plan, size, segment, transports)
            kv_events = _kv_events(config, node)
            if kv_events is not None:
                stack.callback(kv_events.close)
            executor = WorkerExecutor(
                *(runner, segment.blocks, transports, lambda: machine.membership.nodes),
                offload=_offload(config, segment),
                kv_events=kv_events,
                team=team,
                adapters=runner.adapters,
            )
            spans = WorkerSpans(node, wall_offset_ns, machine.batcher)
            return run_service(config, node, machine, executor, spans=spans)
    except ModelError as error:
        raise StartError(f"slipstream {config.role}: {error}", ExitCode.MODEL) from None


def _ways_to(team: Team | None) -> tuple[Ranks, Tell] | tuple[()]:
    return () if team is None else (team.ranks, team.tell)


def _leave_in_order(number: int, _frame: object) -> None:
    """Until the shell listens to signals: what is made so far goes with us."""
    raise SystemExit(128 + number)


def _size(config: WorkerConfig, plan: WorkerPlan, runner: Runner | None, team: Team | None) -> Size:
    """Of the pool. StartError: it is too small for anything."""
    room = room_of(config, plan, runner)
    if team is not None:
        room = room._replace(num_bytes=team.least_room(room.num_bytes))
    size = size_pool(config, plan.layout.block_bytes, plan.max_model_len, room)
    if size.lowered_from:
        _LOG.warning(
            "context %d instead of the model's %d: the pool holds no more (--max-model-len, "
            "--kv-cache-bytes)",
            size.max_model_len,
            size.lowered_from,
        )
    pool_bytes = size.num_blocks * plan.layout.block_bytes * config.tensor_parallel_size
    beside = 0 if plan.share else pool_bytes
    who, free = f"slipstream {config.role}", available_memory()
    require_host_tiers(who, [config.offload_host_bytes], [beside], free)
    return size


def _offload(config: WorkerConfig, segment: Segment | DeviceSegment) -> Offload | None:
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


def _served_name(config: WorkerConfig) -> str:
    return config.served_model_name or Path(config.model).resolve().name


def _node(
    config: WorkerConfig,
    plan: WorkerPlan,
    size: Size,
    segment: Segment | DeviceSegment,
    transports: Transports,
    rank_transports: tuple[dict[str, str], ...],
    adapters: tuple[AdapterInfo, ...],
) -> NodeInfo:
    return NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=segment.header.epoch,
        address=config.advertise,
        host=host_identity(config.shm_dir),
        worker=WorkerInfo(
            model=_served_name(config),
            kv_layout_id=segment.header.kv_layout_id,
            num_blocks=size.num_blocks,
            block_bytes=plan.layout.block_bytes,
            max_model_len=size.max_model_len,
            vocab_size=plan.model.vocab_size,
            max_num_seqs=config.max_num_seqs,
            prefill_budget_tokens=config.prefill_budget_tokens,
            accept_decode=config.accept_decode,
            transports=transports.advertise(),
            quantization=plan.weights,
            device=what_computes(plan),
            rank_transports=rank_transports,
            adapters=adapters,
        ),
    )


def _load_adapters(config: WorkerConfig, book: AdapterBook) -> tuple[AdapterInfo, ...]:
    """Those to begin with. StartError 4: one of them is none, and why."""
    found = []
    for name, path in lora_modules(config.lora_modules):
        if name == _served_name(config):
            raise StartError(
                f"slipstream {config.role}: --lora-modules {name}={path}: that is the name of the "
                "model; give the adapter another one",
                ExitCode.MODEL,
            )
        read = book.read(name, path)
        if read.adapter is None:
            why = read.problem.message if read.problem is not None else "it cannot be read"
            raise StartError(
                f"slipstream {config.role}: --lora-modules {name}={path}: {why}", ExitCode.MODEL
            )
        book.put(read.adapter.adapter_id)
        _LOG.info("LoRA adapter %s from %s", read.adapter.adapter_id, path)
        found.append(read.adapter)
    return tuple(found)


def _kv_events(config: WorkerConfig, node: NodeInfo) -> KvEventPublisher | None:
    if not config.kv_events_endpoint:
        return None
    assert node.worker is not None
    topic = f"kv@{node.node_id}@{node.worker.model}"  # as llm-d reads it
    return KvEventPublisher(
        *(config.kv_events_endpoint, config.kv_events_replay_endpoint, topic),
        config.kv_events_format,
    )


def _settings(config: WorkerConfig, model: ServedModel) -> WorkerSettings:
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


def _how_made(config: WorkerConfig, plan: WorkerPlan) -> str:
    """For the log: the weights, if they are not just those of the files."""
    dummy = ", dummy weights" if config.load_format == "dummy" else ""
    parts = config.tensor_parallel_size
    ranks = f", {parts} ranks" if parts > 1 else ""
    made = "" if plan.weights == "none" else f", {plan.weights} weights"
    if plan.model.quantized is not None:
        made += f" ({plan.model.quantized.method})"
    return dummy + made + ranks


def _announce(
    config: WorkerConfig,
    plan: WorkerPlan,
    size: Size,
    segment: Segment | DeviceSegment,
    transports: Transports,
) -> None:
    _LOG.info(
        "model %s%s, %s%s, context %d, %d KV blocks of %s (%s in %s), transports %s, %s",
        config.model,
        " (by Transformers)" if isinstance(plan.model, ForeignModel) else "",
        plan.dtype,
        _how_made(config, plan),
        size.max_model_len,
        size.num_blocks,
        format_bytes(plan.layout.block_bytes),
        format_bytes(segment.header.file_bytes),
        segment.pages,
        ",".join(transports.advertise()),
        computes_with(plan),
    )
    for name, reason in transports.absent.items():
        _LOG.info("no transport %s: %s", name, reason)
