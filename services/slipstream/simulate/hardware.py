"""What a simulated worker is: the prices of its steps and READs, and the size of its memory."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from slipstream.config import SetupError
from slipstream.core.step_model import StepModel
from slipstream.types import BLOCK_TOKENS

_Positive = Annotated[int, Meta(ge=1)]


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of worker, read from a TOML or JSON file."""

    model: str
    """What it serves, for the reader."""
    kv_bytes_per_token: _Positive
    kv_cache_tokens: Annotated[int, Meta(ge=BLOCK_TOKENS)]
    max_model_len: _Positive
    vocab_size: Annotated[int, Meta(ge=1 << 12, le=1 << 24)]
    max_num_seqs: _Positive
    prefill_budget_tokens: Annotated[int, Meta(ge=BLOCK_TOKENS)]
    read_latency_s: Annotated[float, Meta(ge=0)]
    read_bytes_per_s: Annotated[float, Meta(gt=0)]
    step: StepModel
    host_bytes_per_s: Annotated[float, Meta(gt=0)] = 5e10
    """To host memory and back."""

    def read_s(self, num_blocks: int) -> float:
        """How long one READ of so many blocks takes, if nothing else is on its way."""
        num_bytes = num_blocks * BLOCK_TOKENS * self.kv_bytes_per_token
        return self.read_latency_s + num_bytes / self.read_bytes_per_s

    def host_s(self, num_blocks: int) -> float:
        """How long a copy to host memory or back takes."""
        num_bytes = num_blocks * BLOCK_TOKENS * self.kv_bytes_per_token
        return self.read_latency_s + num_bytes / self.host_bytes_per_s


def presets() -> list[str]:
    """Names of the files that come with us."""
    names = [entry.name for entry in _folder().iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_hardware(name: str) -> Hardware:
    """A preset by its name, or a file. SetupError: what is wrong with it."""
    prefix = f"slipstream simulate: --step-model: {name}"
    preset = name in presets()
    try:
        source = _folder() / f"{name}.toml" if preset else Path(name)
        text = source.read_text(encoding="utf-8")
        is_json = not preset and name.endswith(".json")
        found = msgspec.json.decode(text) if is_json else tomllib.loads(text)
        hardware = msgspec.convert(found, Hardware)
    except FileNotFoundError:
        known = ", ".join(presets())
        raise SetupError(f"{prefix}: no such file, and the presets are {known}") from None
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise SetupError(f"{prefix}: {error}") from None
    for field in msgspec.structs.fields(StepModel):
        seconds = getattr(hardware.step, field.name)
        if not 0 <= seconds < float("inf"):
            raise SetupError(f"{prefix}: step.{field.name} = {seconds}; it must be 0 or more")
    if hardware.step.base_s == 0:
        raise SetupError(f"{prefix}: step.base_s = 0; a step takes time, so it must be above 0")
    return hardware


def _folder() -> resources.abc.Traversable:
    return resources.files("slipstream.simulate") / "presets"
