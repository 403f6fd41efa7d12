"""Which maker of operations computes a model."""

import logging
import os

import torch

from slipstream.config import SetupError
from slipstream.engine.model_config import ModelConfig, ModelError, ServedModel
from slipstream.engine.quantized_config import Number
from slipstream.kernels import cpu
from slipstream.kernels.build import interpreted
from slipstream.kernels.ops import FLOAT8, Backend, Quantization, has_float8
from slipstream.kernels.panels import PANEL
from slipstream.kernels.program import CpuBackend
from slipstream.kernels.reference import Reference
from slipstream.types import BLOCK_TOKENS

_LOG = logging.getLogger(__name__)


def choose_backend(
    config: ServedModel,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "none",
    threads: int = 0,
    kv_dtype: torch.dtype | None = None,
    ranks: bool = False,
) -> Backend:
    """Compiled kernels where they are, built now if they are not yet; else plain torch. A foreign
    model only has its tokens drawn by it.

    `threads`: of compiled kernels, 0 for one on each core. `kv_dtype`: of the pool, if it is not
    `dtype`. `ranks`: several hold the model. SetupError: this device cannot do that.
    """
    if device.type == "cuda" or interpreted():
        return _triton(config, dtype, device, quantization, kv_dtype)
    library = cpu.kernels()
    slow = _no_cpu_kernels(config, quantization, kv_dtype, ranks)
    if slow and library is not None:
        _LOG.warning("SLOW: no CPU kernels for %s; plain torch serves instead", slow)
    if slow or library is None:
        return Reference(quantization)
    return CpuBackend(library, threads or len(os.sched_getaffinity(0)), dtype, quantization)


def byte_rows(device: torch.device) -> Number | None:
    """With which levels of a checkpoint rows are multiplied as bytes. All others are multiplied
    with rows as they are: where nothing is faster, nothing more is rounded."""
    if device.type == "cuda" or interpreted():
        return "float" if has_float8(device) else None
    return "int"


def weights_word(model: ServedModel, asked: Quantization, device: torch.device) -> str:
    """What is multiplied with what, for people and for `KvLayout.layout_id`: `none`, `int8`,
    `w4a16`. ModelError: `asked` for weights that are quantized already."""
    quantized = model.quantized
    if quantized is None:
        return asked
    if asked != "none":
        raise ModelError(
            f"--quantization {asked}: the weights are quantized already ({quantized.method}); give "
            "--quantization none, or take a copy in bfloat16"
        )
    return quantized.word(byte_rows(device) if isinstance(model, ModelConfig) else None)


def _no_cpu_kernels(
    config: ServedModel, quantization: Quantization, kv_dtype: torch.dtype | None, ranks: bool
) -> str:
    """What they cannot do; empty if they can."""
    if ranks:
        return "ranks"
    if quantization == "fp8" or kv_dtype == FLOAT8:
        return "float8 (--quantization int8 has some)"
    if not isinstance(config, ModelConfig):
        return ""
    if config.experts is not None:
        return "experts"
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    odd = any(size % PANEL for size in sizes)
    return f"sizes that {PANEL} does not divide: {sizes}" if odd else ""


def _triton(
    config: ServedModel,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
    kv_dtype: torch.dtype | None,
) -> Backend:
    try:
        # Imported here: who computes on a CPU needs no Triton.
        from slipstream.kernels.gpu.backend import TritonBackend
    except ImportError as error:
        line = f"slipstream: a GPU needs Triton: {error}; install slipstream[gpu]"
        raise SetupError(line) from None
    longest = -(-config.max_position_embeddings // BLOCK_TOKENS)
    try:
        return TritonBackend(dtype, device, quantization, kv_dtype or dtype, max_blocks=longest)
    except ValueError as error:
        raise SetupError(f"slipstream: {error}") from None
