"""Settings of `slipstream prefill`."""

from typing import Annotated, ClassVar

from msgspec import Meta

from slipstream.config import WorkerConfig
from slipstream.types import Role


class PrefillConfig(WorkerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker that computes prompts and hands their KV blocks over."""

    role: ClassVar[Role] = Role.PREFILL

    accept_decode: Annotated[bool, Meta(description="Take requests for decoding.")] = False
