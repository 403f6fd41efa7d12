"""Who computes a model: the native decoder, or Transformers' own code over our KV blocks."""

import logging
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slipstream.config import ModelImpl
from slipstream.engine.adapters import ModelAdapters
from slipstream.engine.backends import weights_word
from slipstream.engine.decoder import Decoder, DecoderWeights
from slipstream.engine.model_config import (
    ForeignModel,
    ModelConfig,
    ModelError,
    ServedModel,
    UnknownModel,
)
from slipstream.engine.packed_file import file_name, shared_weights
from slipstream.engine.ranks import Part, Ranks
from slipstream.engine.weights import load_weights, said_now_and_then
from slipstream.kernels.ops import Backend, ForwardBatch
from slipstream.kernels.program import CpuBackend

_LOG = logging.getLogger(__name__)


class Model(Protocol):
    def forward(self, batch: ForwardBatch, pool: Tensor) -> Tensor:
        """As `Decoder.forward`."""

    def adapters(self, places: int, rank: int) -> ModelAdapters:
        """As `Decoder.adapters`."""


class Loading(NamedTuple):
    """How a model is loaded."""

    dtype: torch.dtype
    device: torch.device
    backend: Backend
    packed_dir: Path | None = None
    """Where packed weights are kept."""
    dummy: bool = False
    ranks: Ranks | None = None
    kv_dtype: torch.dtype | None = None
    """Of the pool, if it is not `dtype`."""


def read_model(
    model_path: str | Path, impl: ModelImpl = "auto", dummy: bool = False
) -> ServedModel:
    """A `ModelConfig` for the native decoder, else a `ForeignModel`; of the latter not the weights,
    but torch and Transformers are loaded. `dummy`: there are no weights.

    ModelError: neither of those that `impl` allows can serve it, and why.
    """
    why = ""
    if impl != "transformers":
        try:
            return ModelConfig.read(model_path, dummy)
        except UnknownModel as error:
            if impl == "native" or dummy:
                raise
            why = f"{error}; "
    from slipstream.engine.transformers_model import read_transformers

    if dummy:
        raise ModelError(f"{model_path}: --load-format dummy is for the native decoder")
    try:
        return read_transformers(model_path)
    except ModelError as error:
        raise ModelError(f"{why}{error}") from error


def load_model(model_path: str | Path, config: ServedModel, how: Loading) -> Model:
    """The model of which `read_model` said `config`, in this rank's part.

    ModelError: its weights are not what `config` says, or it cannot be loaded like this.
    """
    weights_word(config, how.backend.quantization, how.device)  # not quantized twice
    if config.quantized is not None and config.quantized.kv_scales:
        _LOG.warning(
            "%s: the checkpoint's scales for a float8 KV cache are not used; blocks are of the "
            "model's dtype, or with --kv-cache-dtype fp8 scaled otherwise",
            model_path,
        )
    if isinstance(config, ModelConfig):
        return _native(model_path, config, how)
    assert isinstance(config, ForeignModel)
    made, kept = how.backend.quantization, how.kv_dtype
    if made != "none" or kept not in (None, how.dtype):
        asked, instead = f"--quantization {made}", "--quantization none"
        if made == "none":
            asked, instead = "--kv-cache-dtype fp8", "--kv-cache-dtype auto"
        raise ModelError(
            f"{model_path}: {asked} is for the native decoder, which does not compute "
            f"{config.architecture} here; give {instead}"
        )
    from slipstream.engine.transformers_model import load_transformers

    return load_transformers(model_path, config, how.dtype, how.device)


def _native(model_path: str | Path, config: ModelConfig, how: Loading) -> Decoder:
    backend, ranks = how.backend, how.ranks
    if backend.quantization != "none" and config.experts is not None:
        raise ModelError(
            f"{model_path}: {backend.quantization} weights of experts are not supported; give "
            "--quantization none"
        )

    def load() -> DecoderWeights:
        given = config, how.dtype, how.device, backend
        part = Part(ranks.rank, ranks.size) if ranks else Part()
        return load_weights(model_path, *given, said_now_and_then(), part, how.dummy)

    if how.packed_dir is None or how.dummy or not isinstance(backend, CpuBackend):
        weights = load()
    else:
        name = file_name(model_path, config, how.dtype, backend.quantization)
        weights = shared_weights(how.packed_dir / name, load)
    if isinstance(backend, CpuBackend):
        # What is left for torch is small. Its threads would wait for each other at every
        # operation, on cores that others share for as long as the kernel lets those run.
        torch.set_num_threads(1)
    if ranks is None:
        return Decoder(config, weights, backend)
    return Decoder(config.part(ranks.size), weights, backend, ranks.reduce)
