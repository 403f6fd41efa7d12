"""What config.json says of weights that are quantized already. Needs no torch.

Four methods are read: compressed-tensors, AWQ, GPTQ, and float8 as of DeepSeek and Qwen. Which of a
model's matrices are quantized is what its tensors say; how, is said here.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct

Number: TypeAlias = Literal["int", "float"]
"""What levels are."""
_BITS = (4, 8)
_FLOAT8_FORMATS = (None, "e4m3", "float8_e4m3fn")
_COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
)
_STRATEGIES = ("tensor", "channel", "group", "block")


class Scheme(Struct, frozen=True, kw_only=True):
    """How matrices are quantized."""

    bits: int
    number: Number = "int"
    group: int = 0
    """Inputs that have a scale together; 0: all of them"""
    block_outputs: int = 0
    """Outputs that have one together; 0: each has its own, or all have one"""
    zero_offset: int = 0
    """What is added to stored zero points."""
    rows: bool = False
    """Meant for products with rows that are quantized too."""

    def word(self, rows: Number | None) -> str:
        """`w4a16`: bits of weights and of activations; `rows`: see `Quantized.word`."""
        kind = "fp8-" if self.number == "float" else ""
        return f"{kind}w{self.bits}a{8 if self.rows and self.number == rows else 16}"


class Quantized(Struct, frozen=True, kw_only=True):
    """A checkpoint's quantization."""

    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    """With the modules that each is of: names, `re:` and an expression, or a class."""
    kv_scales: bool = False
    """There are scales for a float8 KV cache, which are not used."""

    @property
    def growth(self) -> int:
        """How many times as large such weights are when they are made bfloat16."""
        return max(16 // scheme.bits for _, scheme in self.schemes)

    def scheme(self, module: str) -> Scheme:
        """Of a module that has quantized tensors: the first one of its name, else of its class.
        ValueError: there is none."""
        for fits in (_is_name_of, _is_class):
            for targets, scheme in self.schemes:
                if any(fits(target, module) for target in targets):
                    return scheme
        raise ValueError("config_groups has none for it")

    def word(self, rows: Number | None) -> str:
        """What comes out of it where rows are quantized for products with levels of `rows` alone:
        `w4a16`, `fp8-w8a8`."""
        return "+".join(dict.fromkeys(scheme.word(rows) for _, scheme in self.schemes))


def _is_name_of(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _is_class(target: str, module: str) -> bool:
    """What is quantized is a `Linear`, or stands for one."""
    return not target.startswith("re:") and "." not in target


class _Args(Struct):
    """compressed-tensors' `QuantizationArgs`."""

    num_bits: int = 8
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | str | None = None


class _Group(Struct):
    targets: list[str]
    weights: _Args | None = None
    input_activations: _Args | None = None
    output_activations: _Args | None = None
    format: str | None = None


class _CompressedTensors(Struct):
    config_groups: dict[str, _Group]
    format: str
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class _Awq(Struct):
    bits: int
    group_size: int
    version: str = "gemm"


class _Gptq(Struct):
    bits: int
    group_size: int
    checkpoint_format: str = "gptq"
    is_marlin_format: bool = False


class _Float8(Struct):
    weight_block_size: tuple[int, int] | None = None
    fmt: str | None = None


def read_quantization(settings: dict[str, Any]) -> Quantized | None:
    """Of config.json. ValueError: of a kind that is not supported."""
    given = settings.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method", "unknown method") if isinstance(given, dict) else given
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise ValueError(
            f"quantized weights ({method}) are not supported (only {', '.join(_READERS)}); take "
            "a copy in one of these, or in bfloat16"
        )
    try:
        return reader(given)
    except msgspec.ValidationError as error:
        raise ValueError(f"quantization_config ({method}): {error}") from None
    except re.error as error:
        raise ValueError(f"quantization_config ({method}): targets: {error}") from None


def _allowed(method: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        only = ", ".join(str(each) for each in allowed if each is not None) or "none"
        raise ValueError(
            f"quantized weights ({method}) of {name} {value} are not supported (only {only}); "
            "take a copy in one of these, or in bfloat16"
        )


def _compressed_tensors(given: dict[str, Any]) -> Quantized:
    method = "compressed-tensors"
    config = msgspec.convert(given, _CompressedTensors)
    sparsity = (config.sparsity_config or {}).get("format") or None
    _allowed(method, "sparsity", sparsity, (None, "dense"))
    transforms = (config.transform_config or {}).get("config_groups") or {}
    _allowed(method, "transforms", ", ".join(transforms) or None, (None,))
    schemes = []
    for group in config.config_groups.values():
        if group.weights is None:
            continue
        _allowed(method, "format", group.format or config.format, _COMPRESSED_FORMATS)
        scheme = _scheme(method, group.weights, group.input_activations)
        outputs = group.output_activations
        _allowed(method, "output activations", outputs and outputs.type, (None,))
        for target in group.targets:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        schemes.append((tuple(group.targets), scheme))
    if not schemes:
        raise ValueError(f"quantized weights ({method}): config_groups names none")
    scales = config.kv_cache_scheme is not None
    return Quantized(method=method, schemes=tuple(schemes), kv_scales=scales)


def _scheme(method: str, weights: _Args, inputs: _Args | None) -> Scheme:
    _allowed(method, "type", weights.type, ("int", "float"))
    number: Number = "float" if weights.type == "float" else "int"
    _allowed(method, f"{number} bits", weights.num_bits, (8,) if number == "float" else _BITS)
    strategy = weights.strategy or ("group" if weights.group_size else "tensor")
    _allowed(method, "strategy", strategy, _STRATEGIES)
    if inputs is not None:
        _allowed(method, "activations' bits", inputs.num_bits, (8,))
    rows = inputs is not None and inputs.type == weights.type
    block = weights.block_structure or [0, 0]
    if isinstance(block, str):
        block = [int(size) for size in re.findall(r"\d+", block)]
    if len(block) != 2:
        raise ValueError(f"quantized weights ({method}): block_structure {block} is no pair")
    outputs, group = block if strategy == "block" else (0, weights.group_size or 0)
    return Scheme(
        bits=weights.num_bits,
        number=number,
        group=max(group, 0),
        block_outputs=outputs,
        rows=rows and weights.num_bits == 8 and strategy in ("tensor", "channel"),
    )


def _awq(given: dict[str, Any]) -> Quantized:
    config = msgspec.convert(given, _Awq)
    _allowed("awq", "bits", config.bits, (4,))
    _allowed("awq", "version", config.version.lower(), ("gemm",))
    return _of_all("awq", Scheme(bits=4, group=max(config.group_size, 0)))


def _gptq(given: dict[str, Any]) -> Quantized:
    config = msgspec.convert(given, _Gptq)
    _allowed("gptq", "bits", config.bits, _BITS)
    form = "marlin" if config.is_marlin_format else config.checkpoint_format
    _allowed("gptq", "format", form, ("gptq", "gptq_v2"))
    # The first format stores one less than the zero point.
    offset = 1 if form == "gptq" else 0
    scheme = Scheme(bits=config.bits, group=max(config.group_size, 0), zero_offset=offset)
    return _of_all("gptq", scheme)


def _fp8(given: dict[str, Any]) -> Quantized:
    config = msgspec.convert(given, _Float8)
    _allowed("fp8", "fmt", config.fmt, _FLOAT8_FORMATS)
    outputs, group = config.weight_block_size or (0, 0)
    whole = config.weight_block_size is None
    scheme = Scheme(bits=8, number="float", group=group, block_outputs=outputs, rows=whole)
    return _of_all("fp8", scheme)


def _of_all(method: str, scheme: Scheme) -> Quantized:
    return Quantized(method=method, schemes=((("Linear",), scheme),))


_READERS: dict[str, Callable[[dict[str, Any]], Quantized]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
}
METHODS = tuple(_READERS)
