"""Settings of `slipstream serve`."""

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from slipstream.config import (
    Device,
    Dtype,
    GpuMemoryShare,
    JournalTtl,
    KvCacheBytes,
    KvCacheDtype,
    LoadFormat,
    LogLevel,
    LoraBytes,
    LoraDir,
    LoraModules,
    MaxLoraRank,
    MaxLoras,
    MaxModelLen,
    MaxNumSeqs,
    MaxRequests,
    ModelImpl,
    OffloadAfterHits,
    OffloadDir,
    OffloadDiskBytes,
    OffloadHostBytes,
    PackedWeightsDir,
    PortNumber,
    PrefillBudget,
    Quantization,
    Record,
    RecoveryWait,
    RedisUrl,
    ServedModelName,
    ShmDir,
    Speculative,
    TensorParallelSize,
    Transports,
    Watchdog,
)
from slipstream.config.lora import lora_modules
from slipstream.config.rules import check_offload, check_ranks, check_transports
from slipstream.frontend.config import (
    ApiKeysFile,
    AuditLog,
    LoraUpdates,
    RoutesFile,
    StallTimeout,
)
from slipstream.scheduler.config import (
    Disaggregation,
    MaxQueuedTokens,
    OtlpEndpoint,
    Policy,
    TtftTarget,
    check_otlp_endpoint,
)
from slipstream.tokenizer.config import ReasoningFormat, ToolFormat
from slipstream.types import Role

Count = Annotated[int, Meta(ge=1, le=64)]
WorkerCount = Annotated[int, Meta(ge=0, le=64)]


_ORDER = Role.SCHEDULER, Role.KVINDEX, Role.TOKENIZER, Role.FRONTEND, Role.PREFILL, Role.DECODE


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every service on this machine, from one command, and a private Redis for the index."""

    headings: ClassVar[dict[str, str]] = {
        "model": "Model",
        "prefill": "Processes",
        "host": "HTTP",
        "log_level": "Looking inside",
    }

    model: Annotated[
        str,
        Meta(
            description="Model folder, .gguf file, hub id (org/name), or demo.",
            extra={"positional": "MODEL"},
        ),
    ] = "demo"
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
    speculative: Speculative = ""
    max_loras: MaxLoras = 16
    max_lora_rank: MaxLoraRank = 64
    lora_bytes: LoraBytes = 512 * 2**20
    lora_dir: LoraDir = ""
    lora_modules: LoraModules = ""
    tool_format: ToolFormat = "auto"
    reasoning_format: ReasoningFormat = "auto"

    prefill: Annotated[WorkerCount, Meta(description="Prefill workers.")] = 1
    decode: Annotated[Count, Meta(description="Decode workers.")] = 1
    tokenizer: Annotated[Count, Meta(description="Tokenizers.")] = 1
    frontend: Annotated[Count, Meta(description="Frontends, on port, port + 1, …")] = 1
    kvindex: Annotated[WorkerCount, Meta(description="Index services; 0: place by load.")] = 1
    disaggregation: Disaggregation = "auto"
    policy: Policy = "cost"
    transports: Transports = "auto"
    shm_dir: ShmDir = "/dev/shm"
    offload_host_bytes: OffloadHostBytes = 0
    offload_disk_bytes: OffloadDiskBytes = 0
    offload_dir: OffloadDir = ""
    offload_after_hits: OffloadAfterHits = 1
    threads: Annotated[
        int, Meta(ge=0, le=4096, description="CPU threads of each worker; 0: one for each core.")
    ] = 0
    decode_nice: Annotated[
        int,
        Meta(
            ge=0,
            le=19,
            description="With --disaggregation always: how far decode workers stand back for "
            "prefill workers on the same cores.",
        ),
    ] = 5
    redis_url: RedisUrl = ""
    journal_ttl_s: JournalTtl = 120.0
    join: Annotated[
        str,
        Meta(
            description="Serve one more model in a cluster that runs on this machine: its run "
            "directory, or auto for the only one. Starts tokenizers and workers; --host and --port "
            "name a frontend that is there."
        ),
    ] = ""
    run_dir: Annotated[
        str,
        Meta(description="Folder under which the private run directory is made; empty: temporary."),
    ] = ""
    ready_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="Longest wait for READY before giving up.")
    ] = 600.0

    host: Annotated[str, Meta(min_length=1, description="Address for HTTP.")] = "127.0.0.1"
    port: Annotated[
        int, Meta(ge=1, le=65535, description="Port for HTTP (of the first frontend).")
    ] = 8000
    api_keys_file: ApiKeysFile = ""
    routes_file: RoutesFile = ""
    allow_lora_updates: LoraUpdates = False
    audit_log: AuditLog = ""
    max_requests: MaxRequests = 1024
    max_queued_tokens: MaxQueuedTokens = 4 * 2**20
    ttft_target_s: TtftTarget = 30.0
    recovery_wait_s: RecoveryWait = 30.0
    stall_timeout_s: StallTimeout = 60.0
    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=3600, description="Wait for running requests at Ctrl-C or SIGTERM.")
    ] = 30.0
    watchdog_s: Watchdog = 10.0

    log_level: LogLevel = "info"
    log_json: Annotated[bool, Meta(description="Log lines of services as JSON objects.")] = False
    metrics_port: Annotated[
        PortNumber,
        Meta(description="First port for the services' own /metrics, one each; 0: none."),
    ] = 0
    otlp_endpoint: OtlpEndpoint = ""
    record: Record = ""

    def __post_init__(self) -> None:
        if self.prefill == 0 and self.disaggregation == "always":
            raise ValueError("--prefill 0 needs --disaggregation auto or never")
        check_transports(self.transports)
        check_otlp_endpoint(self.otlp_endpoint)
        check_offload(self.offload_disk_bytes, self.offload_dir)
        check_ranks(self.tensor_parallel_size, bool(self.offload_host_bytes or self.offload_dir))
        lora_modules(self.lora_modules)
        if self.join and self.run_dir:
            raise ValueError("--join names the run directory; leave --run-dir out")
        if self.port + self.frontend - 1 > 65535:
            raise ValueError(f"--port {self.port}: no room for --frontend {self.frontend}")
        if not self.metrics_port:
            return
        last = self.metrics_port + self.num_services - 1
        if last > 65535:
            raise ValueError(
                f"--metrics-port {self.metrics_port}: {self.num_services} processes need one each"
            )
        if self.metrics_port < self.port + self.frontend and self.port <= last:
            raise ValueError(
                f"--metrics-port {self.metrics_port}: {self.num_services} processes take ports up "
                f"to {last}, and --port {self.port} is among them"
            )

    @property
    def num_services(self) -> int:
        """Processes of ours; Redis is none."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[Role, int]:
        """Processes of each role, in the order in which they are started."""
        shared = {Role.SCHEDULER: 1, Role.KVINDEX: self.kvindex, Role.FRONTEND: self.frontend}
        own = {Role.TOKENIZER: self.tokenizer, Role.PREFILL: self.prefill, Role.DECODE: self.decode}
        counts = own if self.join else shared | own
        return {role: counts[role] for role in _ORDER if role in counts}
