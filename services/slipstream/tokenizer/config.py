"""Settings of `slipstream tokenizer`."""

from typing import Annotated, ClassVar, Literal, TypeAlias

from msgspec import Meta

from slipstream.config import MaxModelLen, ServedModelName, ServiceConfig
from slipstream.types import Role

ToolFormat: TypeAlias = Annotated[
    Literal["auto", "hermes", "llama3_json", "mistral", "mistral_named", "pythonic", "none"],
    Meta(description="How the model writes calls of tools; auto: as its chat template says."),
]
ReasoningFormat: TypeAlias = Annotated[
    Literal["auto", "think", "none"],
    Meta(
        description="Whether answers may begin with <think>…</think>; auto: if the chat template "
        "has it."
    ),
]


class TokenizerConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text to tokens and back: chat template, encoding, incremental decoding, stop strings."""

    role: ClassVar[Role] = Role.TOKENIZER

    model: Annotated[str, Meta(min_length=1, description="Model folder with tokenizer.json.")]
    served_model_name: ServedModelName = ""
    max_model_len: MaxModelLen = 0
    threads: Annotated[int, Meta(ge=1, le=256, description="Threads that encode prompts.")] = 2
    tool_format: ToolFormat = "auto"
    reasoning_format: ReasoningFormat = "auto"
