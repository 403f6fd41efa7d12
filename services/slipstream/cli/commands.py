"""The commands and the struct that holds the settings of each; imports no service's code."""

from typing import Annotated

import msgspec
from msgspec import Meta

from slipstream.cli.config import ServeConfig
from slipstream.config import ServiceConfig, ShmDir
from slipstream.decode.config import DecodeConfig
from slipstream.frontend.config import FrontendConfig
from slipstream.kvindex.config import KvIndexConfig
from slipstream.prefill.config import PrefillConfig
from slipstream.scheduler.config import SchedulerConfig
from slipstream.simulate.config import SimulateConfig
from slipstream.tokenizer.config import TokenizerConfig

SERVICES: dict[str, type[ServiceConfig]] = {
    "frontend": FrontendConfig,
    "tokenizer": TokenizerConfig,
    "scheduler": SchedulerConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "kvindex": KvIndexConfig,
}


class PrepareConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Makes a model folder ready and prints its path."""

    model: Annotated[
        str,
        Meta(
            description="Model folder, .gguf file, hub id (org/name), or demo.",
            extra={"positional": "MODEL"},
        ),
    ] = "demo"


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


CONFIGURED: dict[str, type[msgspec.Struct]] = {
    "serve": ServeConfig,
    **SERVICES,
    "simulate": SimulateConfig,
}
"""What has a section in the configuration file and on the reference page."""

SUMMARIES = {
    "serve": "start everything on this machine",
    "frontend": "one frontend: the OpenAI API over HTTP",
    "tokenizer": "one tokenizer: text to tokens and back",
    "scheduler": "the scheduler: owns every request",
    "prefill": "one prefill worker: computes prompts",
    "decode": "one decode worker: generates tokens",
    "kvindex": "one index service: prefixes in Redis",
    "simulate": "replay a trace against a cluster in simulated time",
    "model": "prepare a model: slipstream model prepare [MODEL]",
    "doctor": "what works here: slipstream doctor transports",
    "config": "show settings and their origin; write the reference page",
}


def known_settings() -> set[str]:
    """Every field of every struct: what may stand behind SLIPSTREAM_ in the environment."""
    return {field.name for cls in CONFIGURED.values() for field in msgspec.structs.fields(cls)}
