"""What a model folder says about its model. Needs no torch: supervisors read it too.

Every reason why a model cannot be served is a `ModelError` of one line.
"""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from slipstream.engine.families import FAMILIES, ExpertsConfig, RawConfig
from slipstream.engine.fingerprint import fingerprint
from slipstream.engine.quantized_config import Quantized, read_quantization
from slipstream.kv.layout import KvDtype, KvLayout

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
# Keys that only architectures have which the decoder does not implement.
_EXPERTS = ("num_experts", "num_local_experts")
_EXPERT_ALIGNMENT = 8
"""Elements; rows of experts' matrices begin at multiples of 16 bytes."""
_FOREIGN_FEATURES = {
    "kv_lora_rank": "multi-head latent attention",
    "n_routed_experts": "mixture of experts",
    "attn_logit_softcapping": "attention soft-capping",
    "no_rope_layers": "layers without rotary embedding",
}


class ModelError(Exception):
    """This model cannot be served. One line: which file, what is wrong."""


class UnknownModel(ModelError):
    """The decoder does not have this architecture, or a feature of it."""


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding; the fields mean what they mean in Transformers' `rope_parameters`."""

    rope_type: str
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What everybody but the model itself needs to know of it, whoever computes it."""

    architecture: str
    vocab_size: int
    num_layers: int
    """That have keys and values."""
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    eos_token_ids: frozenset[int]
    dtype: str
    """What config.json says of the weights: `bfloat16`; `float32` if it says nothing."""
    fingerprint: str
    """Equal only where config.json and all weights are; see `fingerprint`."""
    quantized: Quantized | None = None
    """How its weights are quantized already."""

    def kv_layout(self, dtype: KvDtype) -> KvLayout:
        return KvLayout(self.num_layers, self.num_kv_heads, self.head_dim, dtype)

    def part(self, ranks: int) -> "ServedModel":
        """What one of so many ranks has of it. ModelError: it cannot be divided so."""
        if ranks > 1:
            raise ModelError(
                f"--tensor-parallel-size {ranks}: {self.architecture} is computed by Transformers' "
                "code, in one process; give 1"
            )
        return self


class Reach(NamedTuple):
    """Which of the tokens up to its own a query sees; 0: all of them."""

    window: int = 0
    """The last so many, itself among them."""
    chunk: int = 0
    """Those of its own piece of this length."""


class ForeignModel(ServedModel, frozen=True, kw_only=True):
    """A model that Transformers' own code computes, over our KV blocks."""

    reaches: tuple[Reach, ...]
    """One for each layer."""


class ModelConfig(ServedModel, frozen=True, kw_only=True):
    """A model of the native decoder."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    rms_norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    experts: ExpertsConfig | None = None

    def part(self, ranks: int) -> "ModelConfig":
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(self, name) % ranks:
                raise ModelError(
                    f"--tensor-parallel-size {ranks}: the model's {name} is "
                    f"{getattr(self, name)}; give a number that divides it"
                )
        if self.experts is not None:
            sizes = self.experts.count, self.experts.shared_intermediate_size
            if any(size % ranks for size in sizes):
                raise ModelError(
                    f"--tensor-parallel-size {ranks}: the model has {sizes[0]} experts"
                    f"{f' and a shared one of size {sizes[1]}' if sizes[1] else ''}; give a number "
                    "that divides that"
                )
        return msgspec.structs.replace(
            self,
            num_heads=self.num_heads // ranks,
            num_kv_heads=self.num_kv_heads // ranks,
            intermediate_size=self.intermediate_size // ranks,
        )

    @classmethod
    def read(cls, model_path: str | Path, dummy: bool = False) -> "ModelConfig":
        """Reads a Hugging Face folder: config.json, generation_config.json, weight files;
        of those nothing with `dummy`.

        ModelError: no such folder or file, malformed config, no safetensors weights; UnknownModel:
        an architecture or feature that the decoder does not have.
        """
        folder = Path(model_path)
        file = folder / "config.json"
        settings = read_json(file)
        architecture = _architecture(settings, file)
        family = FAMILIES[architecture]
        try:
            raw = msgspec.convert({**family.defaults, **settings}, RawConfig)
        except msgspec.ValidationError as error:
            raise ModelError(f"{file}: {error}") from error
        _refuse_features(architecture, raw, settings, file)
        if family.window(raw):
            raise UnknownModel(f"{file}: sliding window attention is not supported")
        heads = raw.num_attention_heads
        kv_heads = raw.num_key_value_heads if raw.num_key_value_heads is not None else heads
        _check_sizes(raw, kv_heads, file)
        experts = family.experts(raw) if family.experts is not None else None
        if experts is not None:
            _check_experts(experts, raw.hidden_size, file)
        parts = family.parts(raw)
        return cls(
            architecture=architecture,
            vocab_size=raw.vocab_size,
            hidden_size=raw.hidden_size,
            intermediate_size=raw.intermediate_size,
            num_layers=raw.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=raw.head_dim or raw.hidden_size // heads,
            max_position_embeddings=raw.max_position_embeddings,
            rms_norm_epsilon=raw.rms_norm_eps,
            tied_embeddings=raw.tie_word_embeddings,
            rope=_rope(raw, file),
            experts=experts,
            eos_token_ids=eos_token_ids(raw.eos_token_id, folder),
            dtype=raw.dtype or raw.torch_dtype or "float32",
            fingerprint=fingerprint(file, None if dummy else weight_files(folder)),
            quantized=quantization(settings, file, dummy),
            **parts._asdict(),
        )


class _WeightIndex(msgspec.Struct):
    weight_map: dict[str, str]


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, sorted by name.

    ModelError: there are none, a shard is missing, the index is malformed or leads elsewhere.
    """
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        try:
            weight_map = msgspec.json.decode(index_file.read_bytes(), type=_WeightIndex).weight_map
        except msgspec.MsgspecError as error:
            raise ModelError(f"{index_file}: {error}") from error
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index_file}: shard {name!r} lies outside of the folder")
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name}: shard is missing")
        return tuple(folder / name for name in names)
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    raise ModelError(f"{folder}: no weights, neither {single.name} nor {index_file.name}")


def read_json(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: {error}") from error


def _architecture(settings: dict[str, Any], file: Path) -> str:
    named = settings.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ModelError(f"{file}: `architectures` must name one architecture")
    if named[0] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnknownModel(f"{file}: architecture {named[0]} is not supported (only {known})")
    return named[0]


def _refuse_features(
    architecture: str, raw: RawConfig, settings: dict[str, Any], file: Path
) -> None:
    for key, feature in _FOREIGN_FEATURES.items():
        if settings.get(key):
            raise UnknownModel(f"{file}: {feature} ({key}) is not supported")
    if FAMILIES[architecture].experts is None:
        for key in _EXPERTS:
            if settings.get(key):
                raise UnknownModel(f"{file}: mixture of experts ({key}) is not supported")
    if raw.hidden_act not in ("silu", "swish"):
        raise UnknownModel(f"{file}: activation {raw.hidden_act} is not supported (only silu)")


def quantization(settings: dict[str, Any], file: Path, dummy: bool = False) -> Quantized | None:
    """ModelError: of a kind that is not supported, or there are no weights."""
    try:
        quantized = read_quantization(settings)
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from None
    if quantized is not None and dummy:
        raise ModelError(
            f"{file}: --load-format dummy draws no quantized weights ({quantized.method}); take "
            "quantization_config out of a copy of the file"
        )
    return quantized


def _check_sizes(raw: RawConfig, kv_heads: int, file: Path) -> None:
    sizes = {
        "vocab_size": raw.vocab_size,
        "hidden_size": raw.hidden_size,
        "intermediate_size": raw.intermediate_size,
        "num_hidden_layers": raw.num_hidden_layers,
        "num_attention_heads": raw.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": raw.max_position_embeddings,
        "head_dim": raw.head_dim if raw.head_dim is not None else 1,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ModelError(f"{file}: {name} is {size}")
    if raw.num_attention_heads % kv_heads:
        raise ModelError(
            f"{file}: {raw.num_attention_heads} heads are no multiple of {kv_heads} KV heads"
        )
    if raw.head_dim is None and raw.hidden_size % raw.num_attention_heads:
        raise ModelError(f"{file}: hidden_size is no multiple of num_attention_heads")
    if (raw.head_dim or raw.hidden_size // raw.num_attention_heads) % 2:
        raise UnknownModel(f"{file}: rotary embedding needs an even head_dim")


def _check_experts(experts: ExpertsConfig, hidden: int, file: Path) -> None:
    if not 1 <= experts.top_k <= experts.count:
        raise ModelError(f"{file}: {experts.top_k} of {experts.count} experts for each token")
    for size in (hidden, experts.intermediate_size):
        if size < 1:
            raise ModelError(f"{file}: experts of size {size}")
        if size % _EXPERT_ALIGNMENT:
            raise UnknownModel(f"{file}: experts of a size that 8 does not divide ({size})")


def _rope(raw: RawConfig, file: Path) -> RopeConfig:
    """`rope_parameters` (Transformers 5), else `rope_scaling` with `rope_theta` (before)."""
    given = raw.rope_scaling or raw.rope_parameters or {}
    settings = {key: value for key, value in given.items() if value is not None}
    if any(isinstance(value, dict) for value in settings.values()):
        raise UnknownModel(f"{file}: rotary embedding by layer type is not supported")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    needed = _ROPE_NEEDS.get(rope_type) if isinstance(rope_type, str) else None
    if needed is None:
        raise UnknownModel(f"{file}: rotary embedding {rope_type!r} is not supported")
    if missing := [key for key in needed if key not in settings]:
        raise ModelError(f"{file}: rotary embedding {rope_type} lacks {', '.join(missing)}")
    if settings.get("partial_rotary_factor", raw.partial_rotary_factor) != 1.0:
        raise UnknownModel(f"{file}: partial rotary embedding is not supported")
    theta = settings.get("rope_theta", raw.rope_theta)
    original = raw.original_max_position_embeddings or settings.get(
        "original_max_position_embeddings", raw.max_position_embeddings
    )
    try:
        if rope_type == "yarn":
            settings.setdefault("factor", raw.max_position_embeddings / original)
        return msgspec.convert(
            {
                **settings,
                "rope_type": rope_type,
                "theta": 10_000.0 if theta is None else theta,
                "original_max_position_embeddings": original,
            },
            RopeConfig,
        )
    except (msgspec.ValidationError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{file}: rotary embedding: {error}") from error


def eos_token_ids(ids: int | list[int] | None, folder: Path) -> frozenset[int]:
    """Those of generation_config.json where it has any, as `generate` does; else config.json's."""
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            generation = msgspec.json.decode(file.read_bytes(), type=_GenerationConfig)
        except msgspec.MsgspecError as error:
            raise ModelError(f"{file}: {error}") from error
        ids = generation.eos_token_id if generation.eos_token_id is not None else ids
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
