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
        """Of a module that has quantized tensors: by its name, else by the first expression that
        fits, else by its class, else by any. ValueError: there is none."""
        for fits in (str.__eq__, _fits, _is_its_class, _is_class):
            for targets, scheme in self.schemes:
                if any(fits(target, module) for target in targets):
                    return scheme
        raise ValueError("config_groups has none for it")

    def word(self, rows: Number | None) -> str:
        """What comes out of it where rows are quantized for products with levels of `rows` alone:
        `w4a16`, `fp8-w8a8`."""
        return "+".join(dict.fromkeys(scheme.word(rows) for _, scheme in self.schemes))


def _fits(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_its_class(target: str, module: str) -> bool:
    """What is quantized is a `Linear` or stands for one, but for an `Embedding`."""
    is_embedding = re.search("emb(?!ed_out)|wte", module.rpartition(".")[2]) is not None
    return target == ("Embedding" if is_embedding else "Linear")


def _is_class(target: str, module: str) -> bool:
    return target[:1].isupper()


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
    version: str | None = None
    format: str | None = None
    backend: str | None = None


class _Gptq(Struct):
    bits: int
    group_size: int
    checkpoint_format: str | None = None
    format: str | None = None
    is_marlin_format: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    """GPTQModel's: what modules have of their own, by an expression behind `+:`; those behind
    `-:` are not quantized."""


class _Float8(Struct):
    weight_block_size: tuple[int, int] | None = None
    fmt: str | None = None


def _places(settings: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where it may stand; the second name is compressed-tensors' first one."""
    text = settings.get("text_config")
    all_of = [settings, text] if isinstance(text, dict) else [settings]
    return [(each, f"{word}_config") for each in all_of for word in ("quantization", "compression")]


def read_quantization(settings: dict[str, Any]) -> Quantized | None:
    """Of config.json. ValueError: of a kind that is not supported."""
    given = next(filter(None, (place.get(name) for place, name in _places(settings))), None)
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
    form = config.version or config.format or "gemm"
    _allowed("awq", "version", form.lower(), ("gemm",))
    _allowed("awq", "backend", "llm-awq" if config.backend == "llm-awq" else None, (None,))
    return _of_all("awq", Scheme(bits=4, group=max(config.group_size, 0)))


def _gptq(given: dict[str, Any]) -> Quantized:
    config = msgspec.convert(given, _Gptq)
    form = config.checkpoint_format or config.format or "gptq"
    form = "marlin" if config.is_marlin_format else form
    _allowed("gptq", "format", form, ("gptq", "gptq_v2"))
    # The first format stores one less than the zero point.
    offset = 1 if form == "gptq" else 0

    def scheme(own: dict[str, Any]) -> Scheme:
        mine = msgspec.convert({"bits": config.bits, "group_size": config.group_size, **own}, _Gptq)
        _allowed("gptq", "bits", mine.bits, _BITS)
        return Scheme(bits=mine.bits, group=max(mine.group_size, 0), zero_offset=offset)

    own_of = (config.dynamic or {}).items()
    special = [
        ((f"re:{re.compile(name.removeprefix('+:')).pattern}",), scheme(own))
        for name, own in own_of
        if not name.startswith("-:")
    ]
    return Quantized(method="gptq", schemes=(*special, (("Linear",), scheme({}))))


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
