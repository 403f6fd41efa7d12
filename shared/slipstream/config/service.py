"""Settings that every service has, those that both kinds of worker have, and words they share."""

import ipaddress
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from slipstream.config.cluster import InsecureBus, KeysDir, Watchdog
from slipstream.config.devices import Device, GpuMemoryShare, LoadFormat, TensorParallelSize
from slipstream.config.lora import (
    LoraBytes,
    LoraDir,
    LoraModules,
    MaxLoraRank,
    MaxLoras,
    lora_modules,
)
from slipstream.config.rules import check_offload, check_ranks, check_transports, is_loopback
from slipstream.config.values import ByteSize, ConfigError
from slipstream.types import Role, role_of

IPC_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux (`sun_path` less its final zero)."""

PortNumber = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
LogLevel: TypeAlias = Annotated[
    Literal["debug", "info", "warning", "error"], Meta(description="Least level that is logged.")
]
ServedModelName: TypeAlias = Annotated[
    str,
    Meta(
        max_length=128, description="Name of the model in the API; empty: the model folder's name."
    ),
]
Dtype: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Meta(description="Type of weights and KV blocks; auto: the checkpoint's."),
]
Quantization: TypeAlias = Annotated[
    Literal["none", "int8", "fp8"],
    Meta(
        description="Weights of matrix products; none: of type --dtype, or as the checkpoint has "
        "quantized them; int8 (on CPUs) and fp8 (on GPUs): made at load time, one scale for each "
        "output. KV blocks: --kv-cache-dtype."
    ),
]
KvCacheDtype: TypeAlias = Annotated[
    Literal["auto", "fp8"],
    Meta(
        description="Type of KV blocks; auto: --dtype; fp8: a byte for each number, so that twice "
        "the tokens fit; for GPUs."
    ),
]
ModelImpl: TypeAlias = Annotated[
    Literal["auto", "native", "transformers"],
    Meta(
        description="Whose code computes the model; native: ours; transformers: Transformers', "
        "with our attention in it; auto: ours if it knows the model."
    ),
]
PackedWeightsDir: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        description="Folder where packed weights are kept, for the next start and for all workers "
        "of the host, who share their memory; auto: in the user's cache; none: each packs its own.",
    ),
]
MaxModelLen: TypeAlias = Annotated[
    int,
    Meta(ge=0, le=2**24, description="Longest prompt plus answer, in tokens; 0: the model's."),
]
KvCacheBytes: TypeAlias = Annotated[
    ByteSize, Meta(description="Memory for KV blocks of one worker; 0: sized by what is free.")
]
OffloadHostBytes: TypeAlias = Annotated[
    ByteSize,
    Meta(description="Host memory of a worker for KV blocks that its pool has no room for."),
]
OffloadDiskBytes: TypeAlias = Annotated[
    ByteSize, Meta(description="The same on disk, in --offload-dir.")
]
OffloadDir: TypeAlias = Annotated[
    str, Meta(description="Folder for KV blocks on disk; each worker has one of its own in it.")
]
OffloadAfterHits: TypeAlias = Annotated[
    int,
    Meta(
        ge=0, le=1000, description="Hits after which a block is saved below the pool; 0: all are."
    ),
]
MaxNumSeqs: TypeAlias = Annotated[
    int, Meta(ge=1, le=4096, description="Choices that one worker computes at a time.")
]
MaxRequests: TypeAlias = Annotated[
    int, Meta(ge=1, le=1_000_000, description="Live requests; one more is answered with 429.")
]
PrefillBudget: TypeAlias = Annotated[
    int,
    Meta(ge=0, le=2**20, description="Prompt tokens one step may compute; 0: no prefill."),
]
Nice: TypeAlias = Annotated[
    int,
    Meta(ge=0, le=19, description="How far the process stands back where cores are short (nice)."),
]
Transports: TypeAlias = Annotated[
    str,
    Meta(
        description="Ways to move KV blocks, the preferred first: cuda_ipc (GPUs of one host), "
        "shm (one host), nixl (RDMA or TCP), bus (anywhere); auto: all that can work here.",
    ),
]
ShmDir: TypeAlias = Annotated[
    str, Meta(min_length=1, description="Folder of shared-memory segments.")
]
Record: TypeAlias = Annotated[
    str, Meta(description="Folder for recordings of events and effects; empty: none.")
]


Speculative: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^(ngram:([1-9]|1[0-6]))?$",
        description="ngram:k proposes up to k tokens, at most 16, that followed the same words "
        "earlier in a request, and computes them in one step; answers stay the same; empty: off.",
    ),
]


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings that every service has."""

    role: ClassVar[Role]

    node_id: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9._-]{0,64}$",
            description="Name of this process in the cluster; empty: <role>-<host>-<pid>.",
        ),
    ] = ""
    scheduler: Annotated[
        str,
        Meta(
            description="Bus address of the scheduler; empty: scheduler.sock in the run directory."
        ),
    ] = ""
    listen: Annotated[
        str,
        Meta(
            description="Bus address to bind: ipc:///path or tcp://host:port; "
            "empty: <node id>.sock in the run directory."
        ),
    ] = ""
    advertise: Annotated[
        str, Meta(description="Bus address that peers use; empty: as --listen.")
    ] = ""
    keys_dir: KeysDir = ""
    insecure_bus: InsecureBus = False
    run_dir: Annotated[
        str, Meta(description="Private folder for sockets; empty: in XDG_RUNTIME_DIR or /tmp.")
    ] = ""
    log_level: LogLevel = "info"
    log_json: Annotated[bool, Meta(description="Log lines as JSON objects.")] = False
    metrics_port: Annotated[
        PortNumber, Meta(description="Port for /livez, /readyz and /metrics; 0: none.")
    ] = 0
    metrics_host: Annotated[str, Meta(description="Address for the metrics port.")] = "127.0.0.1"
    record: Record = ""
    peer_timeout_s: Annotated[
        Seconds, Meta(description="Silence after which a peer counts as dead.")
    ] = 3.0
    watchdog_s: Watchdog = 10.0
    notify_socket: Annotated[
        str,
        Meta(description="Datagram socket for signs of life, as of sd_notify(3); empty: none."),
    ] = ""


class WorkerConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings that prefill and decode workers share: one program, two sets of weights."""

    model: Annotated[str, Meta(min_length=1, description="Model folder (Hugging Face layout).")]
    served_model_name: ServedModelName = ""
    dtype: Dtype = "auto"
    model_impl: ModelImpl = "auto"
    quantization: Quantization = "none"
    load_format: LoadFormat = "auto"
    device: Device = "auto"
    gpu_memory_share: GpuMemoryShare = 0.0
    tensor_parallel_size: TensorParallelSize = 1
    kv_cache_dtype: KvCacheDtype = "auto"
    packed_weights_dir: PackedWeightsDir = "auto"
    max_model_len: MaxModelLen = 0
    kv_cache_bytes: KvCacheBytes = 0
    max_num_seqs: MaxNumSeqs = 64
    prefill_budget_tokens: PrefillBudget = 256
    accept_decode: Annotated[bool, Meta(description="Take requests for decoding.")] = True
    lease_s: Annotated[
        Seconds, Meta(description="How long computed blocks are kept for a peer without renewal.")
    ] = 10.0
    renew_s: Annotated[Seconds, Meta(description="How often a lease is renewed.")] = 2.0
    pull_timeout_s: Annotated[
        Seconds, Meta(description="Longest wait for blocks of a peer before recomputing.")
    ] = 10.0
    step_timeout_s: Annotated[
        Seconds,
        Meta(
            description="How much longer than others of its size a step may take; a worker that "
            "hangs longer starts anew."
        ),
    ] = 10.0
    speculative: Speculative = ""
    max_loras: MaxLoras = 16
    max_lora_rank: MaxLoraRank = 64
    lora_bytes: LoraBytes = 512 * 2**20
    lora_dir: LoraDir = ""
    lora_modules: LoraModules = ""
    overlap: Annotated[bool, Meta(description="Plan the next step while one runs.")] = True
    transports: Transports = "auto"
    shm_dir: ShmDir = "/dev/shm"
    threads: Annotated[
        int, Meta(ge=0, le=4096, description="CPU threads for computing; 0: one for each core.")
    ] = 0
    nice: Nice = 0
    enable_prefix_caching: Annotated[
        bool, Meta(description="Reuse KV blocks of equal prompt beginnings.")
    ] = True
    offload_host_bytes: OffloadHostBytes = 0
    offload_disk_bytes: OffloadDiskBytes = 0
    offload_dir: OffloadDir = ""
    offload_after_hits: OffloadAfterHits = 1
    kv_events_endpoint: Annotated[
        str,
        Meta(
            pattern=r"^((tcp|ipc)://.+)?$",
            description="ZeroMQ address to publish vLLM's KV events at; tcp://*:5557 is bound, "
            "tcp://host:5557 connected to; one for each worker; empty: none.",
        ),
    ] = ""
    kv_events_replay_endpoint: Annotated[
        str,
        Meta(
            pattern=r"^((tcp|ipc)://.+)?$",
            description="ZeroMQ address to ask for past KV events; empty: none are kept.",
        ),
    ] = ""
    kv_events_format: Annotated[
        Literal["map", "array"],
        Meta(description="map: as vLLM 0.32 writes events; array: as llm-d reads them."),
    ] = "map"

    @property
    def offloads(self) -> bool:
        """Whether there is a tier below the pool."""
        room = self.offload_host_bytes or self.offload_disk_bytes
        return bool(room and self.enable_prefix_caching)

    def __post_init__(self) -> None:
        if self.renew_s >= self.lease_s:
            raise ValueError(
                f"--renew-s {self.renew_s:g} must be less than --lease-s {self.lease_s:g}"
            )
        check_transports(self.transports)
        check_offload(self.offload_disk_bytes, self.offload_dir)
        check_ranks(self.tensor_parallel_size, self.offloads)
        lora_modules(self.lora_modules)
        if self.kv_events_replay_endpoint and not self.kv_events_endpoint:
            raise ValueError("--kv-events-replay-endpoint needs --kv-events-endpoint")


S = TypeVar("S", bound=ServiceConfig)


def default_run_dir(environ: Mapping[str, str]) -> str:
    """Where services that are started one by one meet: one folder for each user of the host."""
    return str(
        Path(environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"slipstream-{os.getuid()}"
    )


def default_packed_weights_dir(environ: Mapping[str, str]) -> str:
    cache = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(cache) / "slipstream" / "weights")


def resolve(config: S, environ: Mapping[str, str]) -> S:
    """Fills in what depends on host, user and process: node id, folders, addresses."""
    host = socket.gethostname()
    run_dir = config.run_dir or default_run_dir(environ)
    node_id = config.node_id or f"{config.role}-{host}-{os.getpid()}"[:64]
    home = f"ipc://{run_dir}/scheduler.sock"
    is_scheduler = config.role is Role.SCHEDULER
    listen = config.listen or (home if is_scheduler else f"ipc://{run_dir}/{node_id}.sock")
    way = "" if is_scheduler else config.scheduler
    family = socket.AF_INET6 if "[" in listen else socket.AF_INET
    advertise = config.advertise or _reachable(listen, _own_number(way, family) or host)
    resolved = msgspec.structs.replace(
        config,
        node_id=node_id,
        run_dir=run_dir,
        listen=listen,
        advertise=advertise,
        scheduler=(advertise if is_scheduler else config.scheduler or home),
    )
    if isinstance(resolved, WorkerConfig) and resolved.packed_weights_dir == "auto":
        folder = default_packed_weights_dir(environ)
        resolved = msgspec.structs.replace(resolved, packed_weights_dir=folder)
    for flag, address in (("--listen", listen), ("--scheduler", resolved.scheduler)):
        _check_address(config.role, flag, address)
    _check_keys(resolved)
    return resolved


def _check_keys(config: ServiceConfig) -> None:
    """Who has no key to show could be anybody."""
    prog = f"slipstream {config.role}"
    if config.keys_dir and role_of(config.node_id) is not config.role:
        raise ConfigError(
            f"{prog}: --node-id {config.node_id}: with --keys-dir it has to be {config.role} or to "
            f"begin with {config.role}-"
        )
    host = config.listen.removeprefix("tcp://").rpartition(":")[0]
    if config.listen.startswith("ipc://") or config.keys_dir or config.insecure_bus:
        return
    if not is_loopback(host):
        raise ConfigError(
            f"{prog}: --listen {config.listen}: whoever comes there could give orders; give "
            "--keys-dir (slipstream keys make FOLDER), or --insecure-bus on a network of your own"
        )


def _own_number(scheduler: str, family: socket.AddressFamily) -> str:
    """The address that this host has on its way to the scheduler; empty if there is no such way
    yet, or one that does not leave the host.

    Rather than a name: peers could look that up for long, once it is gone with its container.
    """
    host, _, port = scheduler.removeprefix("tcp://").rpartition(":")
    if not scheduler.startswith("tcp://") or not port.isdigit():
        return ""
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), family, socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(found[0][4])  # sends nothing
            number = ipaddress.ip_address(probe.getsockname()[0])
    except (OSError, ValueError):
        return ""
    if number.is_loopback:
        return ""
    return f"[{number}]" if number.version == 6 else str(number)


def _reachable(listen: str, host: str) -> str:
    """A wildcard address says where to bind, not how to come here."""
    for wildcard in ("tcp://*:", "tcp://0.0.0.0:", "tcp://[::]:"):
        if listen.startswith(wildcard):
            return f"tcp://{host}:{listen.removeprefix(wildcard)}"
    return listen


def _check_address(role: Role, flag: str, address: str) -> None:
    scheme, _, rest = address.partition("://")
    prog = f"slipstream {role}"
    if scheme == "ipc" and rest:
        if len(os.fsencode(rest)) > IPC_PATH_BYTES:
            raise ConfigError(
                f"{prog}: {flag}: a socket path has at most {IPC_PATH_BYTES} bytes, "
                f"{rest} has {len(os.fsencode(rest))}; use a shorter --run-dir"
            )
        return
    port = rest.rpartition(":")[2]
    if scheme == "tcp" and port.isdigit() and 0 < int(port) <= 65535:
        return
    raise ConfigError(
        f"{prog}: {flag}: expected ipc:///path or tcp://host:port, got {address or repr('')}"
    )
