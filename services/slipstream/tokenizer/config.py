"""Settings of `slipstream tokenizer`."""

from typing import Annotated, ClassVar

from msgspec import Meta

from slipstream.config import MaxModelLen, ServedModelName, ServiceConfig
from slipstream.types import Role


class TokenizerConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text to tokens and back: chat template, encoding, incremental decoding, stop strings."""

    role: ClassVar[Role] = Role.TOKENIZER

    model: Annotated[str, Meta(min_length=1, description="Model folder with tokenizer.json.")]
    served_model_name: ServedModelName = ""
    max_model_len: MaxModelLen = 0
    threads: Annotated[int, Meta(ge=1, le=256, description="Threads that encode prompts.")] = 2
