"""The commands and the struct that holds the settings of each; imports no service's code."""

from collections.abc import Iterable
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from slipstream.cli.client_config import (
    BatchConfig,
    BenchConfig,
    ChatConfig,
    RunConfig,
    TopConfig,
    TraceConfig,
)
from slipstream.cli.config import ServeConfig
from slipstream.config import (
    ENV_PREFIX,
    KeysDir,
    RedisUrl,
    ServiceConfig,
    ShmDir,
    env_of,
)
from slipstream.decode.config import DecodeConfig
from slipstream.frontend.config import ApiKeysFile, FrontendConfig
from slipstream.kvindex.config import KvIndexConfig
from slipstream.prefill.config import PrefillConfig
from slipstream.scheduler.config import SchedulerConfig
from slipstream.simulate.config import SimulateConfig
from slipstream.tokenizer.config import TokenizerConfig


class PrepareConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Makes a model folder ready and prints its path."""

    model: Annotated[
        str,
        Meta(
            description="Model folder, .gguf file, hub id (org/name), or demo.",
            extra={"positional": "MODEL"},
        ),
    ] = "demo"
    link: Annotated[
        str, Meta(description="A symbolic link to the folder, made or made anew; empty: none.")
    ] = ""


class FitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prints a file for `slipstream simulate --step-model`, fitted to what workers recorded."""

    folder: Annotated[
        str,
        Meta(
            description="Recordings that `slipstream serve --record FOLDER` wrote.",
            extra={"positional": "FOLDER"},
        ),
    ]


class DoctorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Checks what Slipstream needs of this machine: one line each, with the way out where something
    is missing. Exit code 1 if something fails."""

    model: Annotated[
        str,
        Meta(
            description="Model folder, .gguf file or demo that should fit into memory.",
            extra={"positional": "MODEL"},
        ),
    ] = "demo"
    host: Annotated[str, Meta(min_length=1, description="Address for HTTP.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535, description="Port for HTTP, to be free.")] = 8000
    redis_url: RedisUrl = ""
    keys_dir: KeysDir = ""
    shm_dir: ShmDir = "/dev/shm"
    json: Annotated[bool, Meta(description="Print JSON instead of a table.")] = False


class TransportsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measures every transport between two processes of this machine."""

    json: Annotated[bool, Meta(description="Print JSON instead of a table.")] = False
    mib: Annotated[int, Meta(ge=1, le=65_536, description="Size of the pool that is read.")] = 128
    block_kib: Annotated[
        int, Meta(ge=1, le=65_536, description="Size of a KV block; the demo model has 360.")
    ] = 360
    shm_dir: ShmDir = "/dev/shm"

    def __post_init__(self) -> None:
        if self.block_kib > self.mib << 10:
            raise ValueError(f"--block-kib {self.block_kib} is more than --mib {self.mib}")


class ShowConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prints the settings of a command as a file for --config, and where each value comes from. The
    other options are those of that command."""

    command: Annotated[
        str, Meta(description="As in `slipstream COMMAND`.", extra={"positional": "COMMAND"})
    ] = "serve"
    origin: Annotated[bool, Meta(description="Name the origin behind each value.")] = True


class KeysConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Makes a key pair for each role, unless the folder has them already. FOLDER/<role> is what a
    process of that role gets, and all of it: its own secret and everybody's public keys."""

    folder: Annotated[str, Meta(description="Where the keys go.", extra={"positional": "FOLDER"})]


class ApiKeyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Makes an API key, prints it, and adds its digest to the file; the key itself is nowhere else.
    A further key of a name that is there has that name's limits, and shares them."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9._-]{1,64}$",
            description="Whose it is: letters, digits, '.', '_', '-'.",
            extra={"positional": "NAME"},
        ),
    ]
    api_keys_file: ApiKeysFile = "api-keys.toml"
    requests_per_minute: Annotated[int, Meta(ge=0, description="0: no limit.")] = 0
    tokens_per_minute: Annotated[
        int, Meta(ge=0, description="Of prompts and answers; 0: no limit.")
    ] = 0
    requests_per_month: Annotated[int, Meta(ge=0, description="0: no limit.")] = 0
    tokens_per_month: Annotated[
        int, Meta(ge=0, description="Of prompts and answers; 0: no limit.")
    ] = 0
    max_concurrent: Annotated[int, Meta(ge=0, description="At a time; 0: no limit.")] = 0
    weight: Annotated[
        int, Meta(ge=1, le=100, description="Its part of the queue, to those of others.")
    ] = 1
    share_prefixes: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9._-]{0,64}$",
            description="A group whose members share cached prompts; empty: none.",
        ),
    ] = ""
    operator: Annotated[
        bool, Meta(description="May read /metrics, /cluster, everybody's usage and traces.")
    ] = False


class DocsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prints the page docs/configuration.md."""


class Command(NamedTuple):
    settings: type[msgspec.Struct]
    summary: str


COMMANDS: dict[str, Command] = {
    "serve": Command(ServeConfig, "start everything on this machine"),
    "run": Command(RunConfig, "one prompt, one answer"),
    "chat": Command(ChatConfig, "a conversation in the terminal"),
    "batch": Command(BatchConfig, "a file of requests, a file of answers"),
    "top": Command(TopConfig, "what a running cluster does, live"),
    "trace": Command(TraceConfig, "the way of one request through all services"),
    "bench": Command(BenchConfig, "put load on a server of OpenAI's API"),
    "doctor": Command(DoctorConfig, "can this machine run it, and if not, why"),
    "doctor transports": Command(TransportsConfig, "how KV blocks can move here, how fast"),
    "model prepare": Command(PrepareConfig, "make a model folder ready, print its path"),
    "config show": Command(ShowConfig, "the settings of a command and their origin"),
    "config docs": Command(DocsConfig, "the reference page of all settings"),
    "keys make": Command(KeysConfig, "keys of the bus, one pair for each role"),
    "keys api": Command(ApiKeyConfig, "one API key for one client"),
    "frontend": Command(FrontendConfig, "one frontend: the OpenAI API over HTTP"),
    "tokenizer": Command(TokenizerConfig, "one tokenizer: text to tokens and back"),
    "scheduler": Command(SchedulerConfig, "the scheduler: owns every request"),
    "prefill": Command(PrefillConfig, "one prefill worker: computes prompts"),
    "decode": Command(DecodeConfig, "one decode worker: generates tokens"),
    "kvindex": Command(KvIndexConfig, "one index service: prefixes in Redis"),
    "simulate": Command(SimulateConfig, "replay a trace against a cluster in simulated time"),
    "simulate fit": Command(FitConfig, "recordings to a file for simulate --step-model"),
}
"""By the one or two words that call it."""

SERVICES: dict[str, type[ServiceConfig]] = {
    name: command.settings
    for name, command in COMMANDS.items()
    if issubclass(command.settings, ServiceConfig)
}

CONFIGURED: dict[str, type[msgspec.Struct]] = {
    name: command.settings for name, command in COMMANDS.items() if " " not in name
}
"""What has a section in the configuration file and on the reference page."""

_READ_BELOW = {env_of("cpu_kernels")}
"""Not a setting: `kernels.build` reads it, wherever it is imported."""


def known_variables() -> set[str]:
    """What of ours may stand in the environment."""
    fields = [
        field.name for one in COMMANDS.values() for field in msgspec.structs.fields(one.settings)
    ]
    return {env_of(name) for name in (*fields, "config")} | _READ_BELOW


def unknown_variables(environ: Iterable[str]) -> list[str]:
    """Those that begin as ours do and that no command reads: misspelt, for nothing else does."""
    known = known_variables()
    return sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)
