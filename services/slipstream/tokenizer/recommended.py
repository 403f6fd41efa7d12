"""What a model's makers recommend for sampling."""

from pathlib import Path

import msgspec

from slipstream.config import StartError
from slipstream.errors import ExitCode
from slipstream.types import SamplingParams


class _GenerationConfig(msgspec.Struct):
    """The part of generation_config.json that is a default for sampling."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def recommended_sampling(folder: Path) -> dict[str, float]:
    """Where they say anything. StartError 4 if nobody could be served with it: every client would
    be blamed for it."""
    file = folder / "generation_config.json"
    try:
        given = msgspec.json.decode(file.read_bytes(), type=_GenerationConfig)
        named = {k: v for k, v in msgspec.structs.asdict(given).items() if v is not None}
        usable = {**named, "top_k": max(0, named.get("top_k", 0))}
        msgspec.convert({"max_tokens": 1, "seed": 0, **usable}, SamplingParams)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise StartError(f"slipstream tokenizer: {file}: {error}", ExitCode.MODEL) from None
    return named
