"""Any decoder-only model whose layers have keys and values of one shape: Transformers' own code,
with its attention over our KV blocks. Serves what the native decoder does not know.

Before it serves, a model is asked twice. `read_transformers` builds it on the meta device, which
costs no memory, and notes what its layers keep. `load_transformers` then has the loaded model
compute a few tokens both ways: what also depends on something else than keys and values shows.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from slipstream.engine.attention_interface import NAME, Paged, Probe, RefusedError, Step, during
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.fingerprint import fingerprint
from slipstream.engine.foreign_adapters import ForeignAdapters
from slipstream.engine.model_config import (
    ForeignModel,
    ModelError,
    eos_token_ids,
    quantization,
    read_json,
    weight_files,
)
from slipstream.kernels.ops import ForwardBatch
from slipstream.types import BLOCK_TOKENS

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Kinds of layers, in config.json's words, that have keys and values and nothing else."""
_NOT_EXACT = {
    "llama4_text": "it scales queries by positions that it counts itself",
}
"""Model types that would pass a proof: what they do differently begins far into a context."""
_PROBED_TOKENS = 3
PROVED = (7, 1, 1, 8)
"""Tokens of the steps of a proof: a prompt, single tokens, a chunk over the border of a block."""
_NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How far a token's logits may be off, relative to their spread."""
_OFF_MAX = 2
"""Tokens of a proof in bfloat16 that may be farther off: rounding decides where experts tie."""


def read_transformers(model_path: str | Path) -> ForeignModel:
    """What `load_transformers` would serve, without its weights.

    ModelError: no such folder, malformed files, no safetensors weights, or why this model cannot
    run on KV blocks.
    """
    folder = Path(model_path)
    file = folder / "config.json"
    settings = read_json(file)
    quantized = quantization(settings, file)
    paths = weight_files(folder)
    with _quiet(), _blamed(str(file)):
        config = _config_of(folder)
        text = config.get_text_config()
        ends = getattr(config if text.eos_token_id is None else text, "eos_token_id", None)
        return ForeignModel(
            **describe(config),
            eos_token_ids=eos_token_ids(ends, folder),
            dtype=str(text.dtype or config.dtype or "float32").removeprefix("torch."),
            fingerprint=fingerprint(file, paths, b"transformers"),
            quantized=quantized,
        )


def describe(config: Any) -> dict[str, Any]:
    """Fields of a `ForeignModel`: what the model's layers say when it runs on the meta device.
    RefusedError: why it cannot run on KV blocks."""
    config = copy.deepcopy(config)
    if config.is_encoder_decoder:
        raise RefusedError("it has an encoder")
    text = config.get_text_config()
    if strange := sorted(set(_kinds(text)) - _ATTENTION):
        raise RefusedError(f"some of its layers are of kind {strange[0]}")
    if text.model_type in _NOT_EXACT:
        raise RefusedError(_NOT_EXACT[text.model_type])
    longest = _longest(text)
    probe = Probe(getattr(text, "attention_chunk_size", None))
    model, logits = _probed(config, probe)
    layers = len(probe.shapes)
    if layers < text.num_hidden_layers:
        how_many = f"{layers} of its {text.num_hidden_layers}" if layers else "none of its"
        raise RefusedError(f"{how_many} layers attend through Transformers' attention interface")
    if len(set(probe.shapes)) > 1:
        shapes = ", ".join(f"{heads} x {dim}" for heads, dim in sorted(set(probe.shapes)))
        raise RefusedError(f"its layers have keys of different shapes ({shapes})")
    if not longest:
        raise RefusedError("its config does not say how long a context may be")
    heads, head_dim = probe.shapes[0]
    return {
        "architecture": type(model).__name__,
        "vocab_size": logits.shape[-1],
        "num_layers": layers,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": longest,
        "reaches": tuple(probe.reaches),
    }


def load_transformers(
    model_path: str | Path, config: ForeignModel, dtype: torch.dtype, device: torch.device
) -> "TransformersModel":
    """The model with its weights, in `dtype`, after the proof. ModelError: tensors are missing or
    have other shapes than config.json says, damaged files, or the proof failed."""
    with _quiet(), _blamed(str(model_path)):
        model, found = _loaded(Path(model_path), config, dtype)
        if missing := sorted(found["missing_keys"]):
            raise ModelError(f"{model_path}: tensor {missing[0]} is missing")
        for name, there, wanted in sorted(found["mismatched_keys"]):
            raise ModelError(
                f"{model_path}: {name} has shape {list(there)}, config.json says {list(wanted)}"
            )
        model.to(device).eval()
        return prove(model, config)


def _config_of(folder: Path) -> Any:
    """As of plain weights: what is quantized is made plain by us."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _loaded(folder: Path, config: ForeignModel, dtype: torch.dtype) -> Any:
    """The model, and what is wrong with its tensors."""
    settings = _config_of(folder)
    model_class: Any = AutoModelForCausalLM
    where: Path | None = folder
    how: dict[str, Any] = {"use_safetensors": True}
    with open_checkpoint(folder, torch.device("cpu"), dtype, config.quantized) as checkpoint:
        if config.quantized is not None:
            with torch.device("meta"):  # which class it is, only a model tells
                model_class, where = type(AutoModelForCausalLM.from_config(settings)), None
            how = {"state_dict": checkpoint.plain()}
    return model_class.from_pretrained(
        where,
        config=settings,
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # it would not say which
        **how,
    )


def prove(model: Any, config: ForeignModel) -> "TransformersModel":
    """Ours, after some tokens came out as by Transformers. RefusedError: they did not."""
    device, dtype = model.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, config.vocab_size, (sum(PROVED),), generator=generator).to(device)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        wanted = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    blocks = -(-len(tokens) // BLOCK_TOKENS)
    shape = (blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
    pool = torch.full(shape, torch.nan, dtype=dtype, device=device)
    ours, start = TransformersModel(model, config), 0
    steps = []
    for count in PROVED:
        with torch.inference_mode():
            steps.append(ours.forward(_alone(tokens[start : start + count], start, blocks), pool))
        start += count
    error = (torch.cat(steps) - wanted).norm(dim=1) / (wanted - wanted.mean(1, True)).norm(dim=1)
    off = int((~(error < _NEAR[dtype])).sum())
    if off > (0 if dtype == torch.float32 else _OFF_MAX):
        raise RefusedError(
            f"{off} of {len(tokens)} tokens come out differently from keys and values alone"
        )
    return ours


class TransformersModel:
    """As `Decoder`: one step at a time."""

    def __init__(self, model: Any, config: ForeignModel) -> None:
        """From now on the model attends as we do."""
        self._model, self._config = model, config
        self._adapters: ForeignAdapters | None = None
        model.set_attn_implementation(NAME)

    def forward(self, batch: ForwardBatch, pool: Tensor) -> Tensor:
        """As `Decoder.forward`."""
        paged = Paged(batch, pool, self._config.reaches)
        adding = nullcontext() if self._adapters is None else self._adapters.during(batch.adapters)
        with adding:
            logits = _run(self._model, paged, batch.tokens, batch.positions, batch.sample_indices)
        return logits.float()

    def adapters(self, places: int, rank: int) -> ForeignAdapters:
        """As `Decoder.adapters`."""
        self._adapters = ForeignAdapters(self._model, places)
        return self._adapters


def _run(model: Any, step: Step, tokens: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """Logits `[len(wanted), vocab]`. The mask of ones says that these are not several sequences,
    of which Transformers would make masks: to whom a token belongs is what the step knows."""
    given = {
        "input_ids": tokens[None],
        "position_ids": positions[None],
        "attention_mask": torch.ones_like(tokens)[None],
    }
    few = _keeps_few(type(model).forward)
    with during(step):
        made = model(**given, use_cache=False, **({"logits_to_keep": wanted} if few else {}))
    logits: Tensor = made.logits[0]
    return logits if few else logits[wanted]


@functools.cache
def _keeps_few(forward: Callable[..., Any]) -> bool:
    """Can it be told which logits are wanted?"""
    return "logits_to_keep" in inspect.signature(forward).parameters


def _alone(tokens: Tensor, start: int, blocks: int) -> ForwardBatch:
    """A batch of one row, whose blocks are the first ones."""
    positions = torch.arange(start, start + len(tokens), device=tokens.device)

    def row(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=tokens.device)

    return ForwardBatch(
        tokens=tokens,
        positions=positions,
        slots=positions,
        block_tables=row(*range(blocks))[None],
        query_starts=row(0, len(tokens)),
        context_lengths=row(start + len(tokens)),
        sample_indices=positions - start,
    )


def _longest(text: Any) -> int | None:
    """Tokens of the longest context, if the config says so. Where angles depend on how long the
    batch's longest row is, it ends where they begin to."""
    longest: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if longest and rope.get("rope_type") == "longrope":
        return min(longest, int(rope.get("original_max_position_embeddings") or longest))
    return longest


def _kinds(text: Any) -> Iterable[str]:
    for name in ("layer_types", "layers_block_type"):
        yield from getattr(text, name, None) or ()


def _probed(config: Any, probe: Probe) -> tuple[Any, Tensor]:
    """The model on the meta device, and logits there; changes the config.
    RefusedError: it cannot be run like that."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):  # they look at positions, there are none
        text.rope_parameters = {**rope, "rope_type": "default"}
    tokens = torch.zeros(_PROBED_TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=NAME, experts_implementation="batched_mm"
            )
        with torch.inference_mode():
            return model, _run(model, probe, tokens, tokens, tokens[:1])
    except RefusedError:
        raise
    except Exception as error:  # a hundred authors' code
        raise RefusedError(_why(error)) from error


def _why(error: Exception) -> str:
    what = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, KeyError) and error.args == (NAME,):
        return "its attention is its own, and not to be replaced"
    if "Reach" in what:
        return "its layers work on attention masks themselves"
    if "meta" in what:
        return "what it computes with depends on values, not on shapes"
    return f"it does not run on packed tokens without a cache ({what.strip()[:90]})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Its remarks are about what we do ourselves."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@contextmanager
def _blamed(who: str) -> Iterator[None]:
    """Turns whatever modelling code raises into one line about this model."""
    try:
        yield
    except RefusedError as error:
        raise ModelError(f"{who}: cannot run on KV blocks: {error}") from None
    except ModelError:
        raise
    except Exception as error:  # a hundred authors' code; each ends as one line
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{who}: Transformers: {type(error).__name__}: {reason}") from error
