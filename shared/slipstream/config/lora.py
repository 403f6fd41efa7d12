"""Settings of what LoRA adapters may take of a worker."""

import re
from typing import Annotated, TypeAlias

from msgspec import Meta

from slipstream.config.values import ByteSize

MaxLoras: TypeAlias = Annotated[
    int,
    Meta(ge=0, le=1024, description="LoRA adapters that a worker holds at a time; 0: none."),
]
MaxLoraRank: TypeAlias = Annotated[
    int, Meta(ge=1, le=512, description="Highest rank of a LoRA adapter.")
]
LoraBytes: TypeAlias = Annotated[
    ByteSize,
    Meta(
        description="Memory of a worker for all its LoRA adapters together; on a GPU it is left "
        "free by the KV blocks."
    ),
]
LoraModules: TypeAlias = Annotated[
    str,
    Meta(
        description="LoRA adapters to begin with: name=folder, several with commas between. "
        "Requests ask for them by the name."
    ),
]
LoraDir: TypeAlias = Annotated[
    str,
    Meta(
        description="Folder in which LoRA adapters lie; others are refused, and paths may be "
        "relative to it; empty: they may lie anywhere."
    ),
]


ADAPTER_NAME = re.compile(r"[A-Za-z0-9._/-]{1,64}")
ADAPTER_NAME_WORDS = "1 to 64 letters, digits, '.', '_', '/' and '-'"


def lora_modules(given: str) -> list[tuple[str, str]]:
    """Names and folders of `--lora-modules`. ValueError: it says something else."""
    found: dict[str, str] = {}
    for item in given.split(",") if given else ():
        name, _, path = item.partition("=")
        if not (ADAPTER_NAME.fullmatch(name) and path) or name in found:
            raise ValueError(
                f"--lora-modules: {item!r:.80} is not name=folder with a name of its own, of "
                f"{ADAPTER_NAME_WORDS}; write 'style=/loras/style,other=/loras/other'"
            )
        found[name] = path
    return list(found.items())
