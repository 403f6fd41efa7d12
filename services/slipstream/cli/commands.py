"""The commands and the struct that holds the settings of each; imports no service's code."""

from collections.abc import Iterable
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from slipstream.cli.config import ServeConfig
from slipstream.config import ENV_PREFIX, ServiceConfig, ShmDir, env_of
from slipstream.decode.config import DecodeConfig
from slipstream.frontend.config import FrontendConfig
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


class TraceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shows the way of one request through all services, with times."""

    id: Annotated[
        str,
        Meta(
            min_length=1,
            description="The answer's id, or its x-request-id header.",
            extra={"positional": "ID"},
        ),
    ]
    url: Annotated[str, Meta(description="Any frontend.")] = "http://127.0.0.1:8000"
    json: Annotated[bool, Meta(description="Print JSON instead of a timeline.")] = False
    mermaid: Annotated[bool, Meta(description="Print a Mermaid gantt chart instead.")] = False
    svg: Annotated[str, Meta(description="Also draw it into this file; empty: do not.")] = ""

    def __post_init__(self) -> None:
        if self.json and (self.mermaid or self.svg):
            raise ValueError("--json goes with neither --mermaid nor --svg")


class ShowConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prints each setting of a command, and where its value comes from. The options are those of
    that command."""

    command: Annotated[
        str, Meta(description="As in `slipstream COMMAND`.", extra={"positional": "COMMAND"})
    ]


class KeysConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Makes a key pair for each role, unless the folder has them already. FOLDER/<role> is what a
    process of that role gets, and all of it: its own secret and everybody's public keys."""

    folder: Annotated[str, Meta(description="Where the keys go.", extra={"positional": "FOLDER"})]


class DocsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prints the page docs/configuration.md."""


class Command(NamedTuple):
    settings: type[msgspec.Struct]
    summary: str


COMMANDS: dict[str, Command] = {
    "serve": Command(ServeConfig, "start everything on this machine"),
    "frontend": Command(FrontendConfig, "one frontend: the OpenAI API over HTTP"),
    "tokenizer": Command(TokenizerConfig, "one tokenizer: text to tokens and back"),
    "scheduler": Command(SchedulerConfig, "the scheduler: owns every request"),
    "prefill": Command(PrefillConfig, "one prefill worker: computes prompts"),
    "decode": Command(DecodeConfig, "one decode worker: generates tokens"),
    "kvindex": Command(KvIndexConfig, "one index service: prefixes in Redis"),
    "simulate": Command(SimulateConfig, "replay a trace against a cluster in simulated time"),
    "simulate fit": Command(FitConfig, "recordings to a file for simulate --step-model"),
    "model prepare": Command(PrepareConfig, "make a model folder ready, print its path"),
    "doctor transports": Command(DoctorConfig, "how KV blocks can move here, how fast, why not"),
    "trace": Command(TraceConfig, "the way of one request through all services"),
    "keys make": Command(KeysConfig, "keys of the bus, one pair for each role"),
    "config show": Command(ShowConfig, "the settings of a command and their origin"),
    "config docs": Command(DocsConfig, "the reference page of all settings"),
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
