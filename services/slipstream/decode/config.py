"""Settings of `slipstream decode`."""

from typing import ClassVar

from slipstream.config import WorkerConfig
from slipstream.types import Role


class DecodeConfig(WorkerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker that pulls KV blocks, generates, and streams tokens to the tokenizer."""

    role: ClassVar[Role] = Role.DECODE
