"""What the children of `slipstream serve` would refuse, found before the first of them starts."""

from collections.abc import Sequence
from pathlib import Path

from slipstream.cli.commands import SERVICES
from slipstream.cli.plan import ChildSpec
from slipstream.config import (
    AUTO_TRANSPORTS,
    ServiceConfig,
    WorkerConfig,
    load,
    make_folder,
    require_folder,
)
from slipstream.kvindex.config import KvIndexConfig

_PROG = "slipstream serve"


def preflight(children: Sequence[ChildSpec]) -> None:
    """Each child's settings are read as it will read them, from its flags, its environment and the
    file, and held against this machine. StartError: why one of them would not start."""
    for child in children:
        if child.role in SERVICES:
            config = load(SERVICES[child.role], child.role, child.flags, child.env)
            _check(config)


def _check(config: ServiceConfig) -> None:
    if config.record:
        make_folder(_PROG, "--record", Path(config.record), 0o700)
    if isinstance(config, WorkerConfig):
        require_folder(_PROG, "--shm-dir", Path(config.shm_dir))
        if config.offload_dir:
            make_folder(_PROG, "--offload-dir", Path(config.offload_dir))
        if config.transports != AUTO_TRANSPORTS:
            from slipstream.kv.offers import require_possible

            require_possible(config.transports)
    if isinstance(config, KvIndexConfig):
        from slipstream.kvindex.connect import require_url

        require_url(_PROG, config.redis_url)
