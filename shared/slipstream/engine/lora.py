"""LoRA adapters as PEFT saves them: folders of adapter_config.json and adapter_model.safetensors.

Which matrices are meant the tensors say themselves; what scales them, the config. Whatever else a
config asks for is refused: an adapter that is half understood says something else than it learnt.
No pickle is ever read.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.config import format_bytes

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CONFIG_BYTES_MAX = 1 << 20
NAME_CHARACTERS_MAX = 100
VERSION_CHARACTERS = 16
_PATTERN_CHARACTERS_MAX = 200
_REPEATS_MAX, _PATTERNS_MAX = 2, 64
"""Of a pattern: what it may cost grows with each."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`: those that leave the base model's weights what they are."""
_OF_TRAINING = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    "layers_pattern",
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config"),
    *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "target_modules", "task_type", "use_rslora"),
}
"""Keys of a config that are read here, or change nothing behind the training."""
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside it (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "lora_bias": "biases (lora_bias)",
    "target_parameters": "parameters that are no matrix of a layer (target_parameters)",
    "layer_replication": "layers that are used twice (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
}
_MERGE = "; merge it into the model (PEFT: merge_and_unload) and serve that"
T = TypeVar("T")


class AdapterError(Exception):
    """One line that says what is wrong, and what to do."""


class Low(NamedTuple):
    """What is added to one module: `scale * (x @ down.T) @ up.T`."""

    down: Tensor
    """`[rank, in]`"""
    up: Tensor
    """`[out, rank]`"""
    scale: float


class Lora(NamedTuple):
    version: str
    """A digest of all that it adds."""
    rank: int
    """The highest."""
    modules: dict[str, Low]


class LoraLimits(NamedTuple):
    loras: int = 16
    rank: int = 64
    num_bytes: int = 512 << 20
    folder: str = ""
    """Where they have to lie; empty: anywhere."""


class _Config(msgspec.Struct):
    """adapter_config.json as far as it is read."""

    r: int
    lora_alpha: float
    peft_type: str = ""
    bias: str = "none"
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None

    def rank_of(self, module: str) -> int:
        return _patterned(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _patterned(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora(
    path: str,
    modules: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
    limits: LoraLimits,
    bytes_left: int,
) -> Lora:
    """`modules`: outputs and inputs of what may be added to. In `dtype`, in memory of our own.

    AdapterError: there is none, it is broken, made for another model, larger than `limits` or
    `bytes_left`, or asks for something that is not supported.
    """
    folder = _folder(path, limits)
    config = _read_config(_file(folder, CONFIG, limits))
    weights = _file(folder, WEIGHTS, limits)
    try:
        with safe_open(str(weights), framework="pt") as file:
            halves = _halves(file, config, modules, limits, weights)
            names = {module for module, _ in halves}
            needed = sum(config.rank_of(each) * sum(modules[each]) for each in names)
            if needed * dtype.itemsize > bytes_left:
                raise AdapterError(
                    f"{folder} needs {format_bytes(needed * dtype.itemsize)}, of --lora-bytes "
                    f"{format_bytes(limits.num_bytes)} {format_bytes(bytes_left)} are left; "
                    "unload another one, or raise it"
                )
            return _read(file, sorted(names), halves, config, dtype, weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AdapterError(f"{weights}: {error}") from error


def _folder(path: str, limits: LoraLimits) -> Path:
    root = Path(limits.folder).resolve() if limits.folder else None
    given = (root or Path()) / path
    if not given.is_absolute() or "\0" in path:
        raise AdapterError(f"{path}: a LoRA adapter needs an absolute path, or give --lora-dir")
    with _no_such(given):
        folder = given.resolve(strict=True)
    if root is not None and not folder.is_relative_to(root):
        raise AdapterError(f"{path}: lies outside of --lora-dir {root}; put it there")
    if not folder.is_dir():
        raise AdapterError(f"{path}: is no folder; give the one that {CONFIG} is in")
    return folder


def _file(folder: Path, name: str, limits: LoraLimits) -> Path:
    file = folder / name
    if name == WEIGHTS and not file.exists() and (folder / PICKLE).exists():
        raise AdapterError(
            f"{folder / PICKLE}: is a pickle, which is never read; save the adapter as {WEIGHTS} "
            "(PEFT: save_pretrained)"
        )
    with _no_such(file):
        found = file.resolve(strict=True)
    if limits.folder and not found.is_relative_to(Path(limits.folder).resolve()):
        raise AdapterError(f"{file}: lies outside of --lora-dir {limits.folder}; put it there")
    if not found.is_file():
        raise AdapterError(f"{file}: is no file")
    return found


@contextmanager
def _no_such(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path}: {reason}; give the folder of a LoRA adapter") from error


def _read_config(file: Path) -> _Config:
    if file.stat().st_size > CONFIG_BYTES_MAX:
        raise AdapterError(f"{file}: is larger than {format_bytes(CONFIG_BYTES_MAX)}")
    try:
        settings = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        config = msgspec.convert(settings, _Config)
    except OSError as error:
        raise AdapterError(f"{file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file}: {error}") from error
    if config.peft_type != "LORA":
        raise AdapterError(f"{file}: peft_type is {config.peft_type!r:.40}; only LORA is supported")
    for key, value in settings.items():
        if not value or key in _OF_TRAINING:
            continue
        if key in _UNSUPPORTED:
            raise AdapterError(
                f"{file}: asks for {_UNSUPPORTED[key]}, which is not supported{_MERGE}"
            )
        raise AdapterError(f"{file}: {key:.60} is not known, and may change what is added{_MERGE}")
    if config.bias != "none":
        raise AdapterError(
            f"{file}: asks for biases (bias: {config.bias:.20}), which is not supported{_MERGE}"
        )
    if config.init_lora_weights not in _STARTS:
        raise AdapterError(
            f"{file}: init_lora_weights {config.init_lora_weights!r:.40} changes the model's own "
            "weights; save the adapter converted to plain LoRA (PEFT: "
            "path_initial_model_for_weight_conversion)"
        )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if any(rank < 1 for rank in ranks):
        raise AdapterError(f"{file}: a rank of {min(ranks)}; it is 1 at least")
    if not all(map(math.isfinite, [config.lora_alpha, *(config.alpha_pattern or {}).values()])):
        raise AdapterError(f"{file}: an alpha that is no number")
    patterns = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    if len(patterns) > _PATTERNS_MAX:
        raise AdapterError(f"{file}: {len(patterns)} patterns; at most {_PATTERNS_MAX} are read")
    for pattern in patterns:
        _check_pattern(pattern, file)
    return config


def _check_pattern(pattern: str, file: Path) -> None:
    """A pattern that is searched for in names, by somebody whom nobody knows."""
    what = f"{file}: pattern {pattern!r:.60}"
    repeats = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > _PATTERN_CHARACTERS_MAX or repeats > _REPEATS_MAX or ")" in pattern:
        raise AdapterError(
            f"{what} may take very long to search for: at most {_PATTERN_CHARACTERS_MAX} "
            f"characters, {_REPEATS_MAX} repeats and no groups; name the modules instead"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{what}: {error}") from error


def _patterned(patterns: Mapping[str, T] | None, module: str, otherwise: T) -> T:
    """As PEFT does it: the first pattern that is an end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _halves(
    file: Any,
    config: _Config,
    modules: Mapping[str, tuple[int, int]],
    limits: LoraLimits,
    path: Path,
) -> dict[tuple[str, str], str]:
    """Names of tensors by module and half; of the right shapes, and none is missing."""
    halves: dict[tuple[str, str], str] = {}
    for tensor in sorted(file.keys()):
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            raise AdapterError(f"{path}: tensor {tensor:.120} is not supported{_MERGE}")
        module, half = match.groups()
        if module not in modules:
            raise AdapterError(_not_there(path, module, config, modules))
        rank, (outputs, inputs) = config.rank_of(module), modules[module]
        if rank > limits.rank:
            raise AdapterError(
                f"{path}: {module} has rank {rank}; --max-lora-rank is {limits.rank}, raise it"
            )
        wanted = [rank, inputs] if half == "A" else [outputs, rank]
        found = file.get_slice(tensor).get_shape()
        if found != wanted:
            raise AdapterError(
                f"{path}: {tensor} has shape {found}, model and config say {wanted}"
                f"{_made_for(config)}"
            )
        halves[module, half] = tensor
    for module, half in halves:
        if (module, "AB".replace(half, "")) not in halves:
            raise AdapterError(f"{path}: {module} has half an adapter: lora_{half} alone")
    if not halves:
        raise AdapterError(f"{path}: has no tensors")
    named = isinstance(config.target_modules, list) and not config.exclude_modules
    for target in config.target_modules or () if named else ():
        # One that the model has nowhere is a word of a list that was written for many models.
        meant = {module for module in modules if f".{module}".endswith(f".{target}")}
        if meant and not any((module, "A") in halves for module in meant):
            raise AdapterError(f"{path}: has no tensors of {target:.60}, which target_modules name")
    return halves


def _not_there(
    path: Path, module: str, config: _Config, modules: Mapping[str, tuple[int, int]]
) -> str:
    ends = sorted({name.rpartition(".")[2] for name in modules})
    return (
        f"{path}: adds to {module:.120}; here adapters add to {', '.join(ends)} of the model's "
        f"{len({re.sub('[^0-9]+', ' ', name) for name in modules})} layers{_made_for(config)}"
    )


def _made_for(config: _Config) -> str:
    made_for = config.base_model_name_or_path
    return f"; it was made for {made_for:.120}" if made_for else ""


def _read(
    file: Any,
    names: list[str],
    halves: Mapping[tuple[str, str], str],
    config: _Config,
    dtype: torch.dtype,
    path: Path,
) -> Lora:
    digest, modules, highest = hashlib.sha256(), {}, 0
    for module in names:
        scale = config.scale_of(module)
        digest.update(f"{module}\0{scale!r}\0".encode())
        pair = []
        for half in "AB":
            tensor: Tensor = file.get_tensor(halves[module, half])
            if tensor.dtype not in _FLOATS:
                raise AdapterError(
                    f"{path}: {halves[module, half]} is {tensor.dtype}, which is not supported"
                )
            digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            made = tensor.to(dtype, copy=True)
            if not made.isfinite().all():
                raise AdapterError(
                    f"{path}: {halves[module, half]} has numbers that are none (NaN or infinite)"
                )
            pair.append(made)
        modules[module] = Low(pair[0], pair[1], scale)
        highest = max(highest, len(pair[0]))
    return Lora(digest.hexdigest()[:VERSION_CHARACTERS], highest, modules)
