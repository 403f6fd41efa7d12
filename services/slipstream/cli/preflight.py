"""What the children of `slipstream serve` would refuse, found before the first of them starts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from slipstream.cli.commands import SERVICES
from slipstream.cli.plan import ChildSpec
from slipstream.config import (
    AUTO_TRANSPORTS,
    ServiceConfig,
    SetupError,
    WorkerConfig,
    load,
    make_folder,
    require_folder,
)
from slipstream.frontend.config import FrontendConfig
from slipstream.kvindex.config import KvIndexConfig
from slipstream.runtime.memory import available_memory, require_host_tiers, require_pools
from slipstream.scheduler.config import SchedulerConfig

_PROG = "slipstream serve"


def preflight(children: Sequence[ChildSpec]) -> None:
    """Each child's settings are read as it will read them, from its flags, its environment and the
    file, and held against this machine. StartError: why one of them would not start."""
    ours = [child for child in children if child.role in SERVICES]
    configs = [load(SERVICES[each.role], each.role, each.flags, each.env) for each in ours]
    for config, child in zip(configs, ours, strict=True):
        _check(config, child.env)
    workers = [
        (config, _on_gpu(config.device, child.env))
        for config, child in zip(configs, ours, strict=True)
        if isinstance(config, WorkerConfig)
    ]
    _check_memory([config for config, on_gpu in workers if on_gpu is False])
    _check_shares([config for config, on_gpu in workers if on_gpu])


def _on_gpu(device: str, env: Mapping[str, str]) -> bool | None:
    """None: where torch can use the GPU that is there."""
    from slipstream.kv.cuda_driver import count_gpus

    if device.startswith("auto") and count_gpus(env):
        return None
    return device.startswith("cuda")


def _check(config: ServiceConfig, env: Mapping[str, str]) -> None:
    if config.record:
        make_folder(_PROG, "--record", Path(config.record), 0o700)
    if isinstance(config, WorkerConfig):
        require_folder(_PROG, "--shm-dir", Path(config.shm_dir))
        if config.offload_dir:
            make_folder(_PROG, "--offload-dir", Path(config.offload_dir))
        if config.transports != AUTO_TRANSPORTS:
            from slipstream.kv.offers import require_possible

            require_possible(config.transports, on_gpu=_on_gpu(config.device, env))
    if isinstance(config, FrontendConfig) and config.api_keys_file:
        from slipstream.frontend.api_keys import read

        read(config.api_keys_file)
    if isinstance(config, FrontendConfig) and config.routes_file:
        from slipstream.frontend import routes

        routes.read(config.routes_file)
    if isinstance(config, FrontendConfig) and config.audit_log:
        from slipstream.frontend.audit import require_file

        os.close(require_file(config.audit_log))
    if isinstance(config, KvIndexConfig):
        from slipstream.runtime.redis_url import require_url

        require_url(_PROG, config.redis_url)
    if isinstance(config, SchedulerConfig) and config.otlp_endpoint:
        from slipstream.scheduler.otlp import load_proto

        load_proto(_PROG)


def _check_shares(workers: Sequence[WorkerConfig]) -> None:
    """What all workers of a GPU may fill together."""
    for device in sorted({worker.device for worker in workers}):
        shares = [worker.gpu_memory_share for worker in workers if worker.device == device]
        if sum(shares) > 1:
            raise SetupError(
                f"{_PROG}: --gpu-memory-share {max(shares):g} for each of {len(shares)} workers on "
                f"{device} is more than the GPU has; give {1 / len(shares):.2g} or less"
            )


def _check_memory(workers: Sequence[WorkerConfig]) -> None:
    """What all workers ask for together; who asks for nothing takes what it finds."""
    from slipstream.kv.segment import free_bytes

    free, pools = available_memory(), [worker.kv_cache_bytes for worker in workers]
    require_pools(_PROG, pools, free, "memory")
    for shm_dir in sorted({worker.shm_dir for worker in workers}):
        there = [worker.kv_cache_bytes for worker in workers if worker.shm_dir == shm_dir]
        require_pools(_PROG, there, free_bytes(shm_dir), shm_dir)
    require_host_tiers(_PROG, [worker.offload_host_bytes for worker in workers], pools, free)
