"""Safetensors checkpoints -> the decoder's parameters. Only this file knows their names.

Tensors are checked against the config, converted and packed.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from slipstream.engine.backends import byte_rows
from slipstream.engine.checkpoint import Cut, open_checkpoint
from slipstream.engine.decoder import DecoderWeights, LayerWeights
from slipstream.engine.families import ExpertsConfig
from slipstream.engine.model_config import ModelConfig, ModelError
from slipstream.engine.ranks import Part
from slipstream.kernels.levels import Levels, together
from slipstream.kernels.ops import Backend, Experts, SharedExpert

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

SAID_EVERY_S = 2.0
_LOG = logging.getLogger(__name__)
_Projection: TypeAlias = tuple[Tensor | Levels, Tensor | None]
"""Weight and bias."""


def said_now_and_then() -> Progress:
    """In the log, where `slipstream serve` finds it; of a model that is there at once nothing."""
    said_s = time.monotonic()

    def progress(done: int, layers: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= SAID_EVERY_S:
            said_s = time.monotonic()
            _LOG.info("weights: %d of %d layers", done, layers)

    return progress


def load_weights(
    model_path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    progress: Progress = lambda done, layers: None,
    part: Part = Part(),  # noqa: B008 it never changes
    dummy: bool = False,
) -> DecoderWeights:
    """All parameters in `dtype`, in memory of our own, matrices as `backend` wants them.

    `config`: the whole model's; `part`: what is loaded of its heads and inner dimensions. `dummy`:
    random ones, no file is read.

    ModelError, naming the file: truncated or corrupt files, missing tensors, wrong shapes, tensors
    that the config does not account for (a feature that would silently be left out).
    """
    how = dtype, device, backend, part
    if dummy:
        return _Loader(_Dummies(device), config, *how).load(progress)
    quantized = dtype, config.quantized, byte_rows(device)
    with open_checkpoint(Path(model_path), device, *quantized) as checkpoint:
        weights = _Loader(checkpoint, config, *how).load(progress)
        if unread := checkpoint.unread(config.tied_embeddings):
            raise ModelError(f"{model_path}: config.json does not account for tensor {unread[0]}")
        return weights


class _Source(Protocol):
    def read(self, name: str, shape: tuple[int, ...], cut: Cut = ()) -> Tensor:
        """`cut` of the tensor, which has this shape."""

    def levels(self, name: str, shape: tuple[int, ...]) -> Levels | None:
        """All of the tensor, if it is a weight that is quantized."""

    def skip(self, name: str) -> None:
        """All of it is other ranks'."""


class _Dummies:
    """Random weights of a size that keeps activations small; a name's are the same in every
    process and for every part, on devices of one kind."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def levels(self, name: str, shape: tuple[int, ...]) -> None:
        pass

    def skip(self, name: str) -> None:
        pass

    def read(self, name: str, shape: tuple[int, ...], cut: Cut = ()) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, device=self._device)[cut]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        generator = torch.Generator(self._device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=self._device)
        return drawn.mul_(shape[-1] ** -0.5)[cut]


class _Loader:
    def __init__(
        self,
        checkpoint: _Source,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        part: Part,
    ) -> None:
        self._checkpoint = checkpoint
        self._part = part
        self._config = config
        self._dtype = dtype
        self._device = device
        self._backend = backend

    def load(self, progress: Progress) -> DecoderWeights:
        config = self._config
        vocabulary = (config.vocab_size, config.hidden_size)
        table = own = self._packed(["model.embed_tokens.weight"], [vocabulary])
        embedding = self._backend.table(table)
        if not config.tied_embeddings:
            own = self._packed(["lm_head.weight"], [vocabulary])
        # Logits of float8 would put other tokens first: they differ by less than it rounds off.
        if self._backend.quantization == "int8":
            head = self._backend.pack(own)
        else:
            head = embedding if own is table else self._backend.table(own)
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layers(progress)),
            norm=self._vector("model.norm.weight", config.hidden_size),
            lm_head=head,
        )

    def _layers(self, progress: Progress) -> Iterator[LayerWeights]:
        layers = self._config.num_layers
        for index in range(layers):
            progress(index, layers)
            yield self._layer(index)

    def _layer(self, index: int) -> LayerWeights:
        config, at = self._config, f"model.layers.{index}"
        hidden = config.hidden_size
        query = config.num_heads * config.head_dim
        key = config.num_kv_heads * config.head_dim
        attention = f"{at}.self_attn"
        qkv = [(f"{attention}.{name}_proj", size) for name, size in zip("qkv", (query, key, key))]  # noqa: B905
        pack = self._backend.pack
        head_norms = None
        if config.qk_norm:
            head_norms = (
                self._vector(f"{attention}.q_norm.weight", config.head_dim),
                self._vector(f"{attention}.k_norm.weight", config.head_dim),
            )
        return LayerWeights(
            attention_norm=self._vector(f"{at}.input_layernorm.weight", hidden),
            qkv=pack(*self._linear(qkv, hidden, config.qkv_bias)),
            head_norms=head_norms,
            output=pack(*self._partial((f"{attention}.o_proj", hidden), query, config.output_bias)),
            mlp_norm=self._vector(f"{at}.post_attention_layernorm.weight", hidden),
            **self._mlp(index, at),
        )

    def _mlp(self, index: int, at: str) -> dict[str, Any]:
        """Of a layer: the fields of its MLP."""
        config, mlp = self._config, f"{at}.mlp"
        if config.experts is not None and index in config.experts.layers:
            return {"gate_up": None, "down": None, "experts": self._experts(at, config.experts)}
        gate_up, down = self._gated(mlp, config.intermediate_size, config.mlp_bias)
        return {"gate_up": self._backend.pack_gated(*gate_up), "down": self._backend.pack(*down)}

    def _gated(self, mlp: str, inner: int, has_bias: bool) -> tuple[_Projection, _Projection]:
        """Gate and up, down."""
        hidden = self._config.hidden_size
        gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
        down = self._partial((f"{mlp}.down_proj", hidden), inner, has_bias)
        return self._linear(gate_up, hidden, has_bias), down

    def _experts(self, at: str, config: ExpertsConfig) -> Experts:
        """This rank's. Which of them a token goes to is known on every rank."""
        hidden, inner = self._config.hidden_size, config.intermediate_size
        mlp, own = f"{at}.{config.module}", self._part.of(config.count)
        gate, up, down = config.names
        count = own.stop - own.start
        gate_ups = self._empty(count, 2 * inner, hidden)
        downs = self._empty(count, hidden, inner)
        for number in range(config.count):
            expert, place = f"{mlp}.experts.{number}", number - own.start
            if not 0 <= place < count:
                for name in config.names:
                    self._checkpoint.skip(f"{expert}.{name}.weight")
                continue
            for half, name in enumerate((gate, up)):
                read = self._checkpoint.read(f"{expert}.{name}.weight", (inner, hidden))
                gate_ups[place, half * inner : (half + 1) * inner].copy_(read)
            downs[place].copy_(self._checkpoint.read(f"{expert}.{down}.weight", (hidden, inner)))
        shared = None
        if config.shared_intermediate_size:
            both = self._gated(f"{mlp}.shared_expert", config.shared_intermediate_size, False)
            gate_of_all = self._packed([f"{mlp}.shared_expert_gate.weight"], [(1, hidden)])
            shared = SharedExpert(_plain(both[0][0]), _plain(both[1][0]), gate_of_all)
        return Experts(
            router=self._packed([f"{mlp}.gate.weight"], [(config.count, hidden)]),
            gate_up=gate_ups,
            down=downs,
            first=own.start,
            top_k=config.top_k,
            normalized=config.normalized,
            shared=shared,
        )

    def _linear(self, parts: list[tuple[str, int]], inputs: int, has_bias: bool) -> _Projection:
        """Projections with the same input, one under the other in the order given; of each this
        rank's outputs."""
        names, sizes = [name for name, _ in parts], [size for _, size in parts]
        shapes: list[tuple[int, ...]] = [(size, inputs) for size in sizes]
        weights = [f"{name}.weight" for name in names]
        weight = self._levels(weights, shapes) or self._packed(weights, shapes, divided=True)
        if not has_bias:
            return weight, None
        biases = [f"{name}.bias" for name in names]
        return weight, self._packed(biases, [(size,) for size in sizes], divided=True)

    def _partial(self, projection: tuple[str, int], inputs: int, has_bias: bool) -> _Projection:
        """A projection of this rank's inputs; the ranks' results are to be added, so that one rank
        alone has the bias."""
        name, outputs = projection
        of_name = f"{name}.weight", (outputs, inputs)
        weight: Tensor | Levels | None = self._checkpoint.levels(*of_name)
        if isinstance(weight, Levels) and self._part.size > 1:
            weight = weight.of_inputs(self._part.of(inputs))
        if weight is None:
            cut = () if self._part.size == 1 else (slice(None), self._part.of(inputs))
            read = self._checkpoint.read(*of_name, cut)
            weight = self._empty(*read.shape).copy_(read)
        bias = self._vector(f"{name}.bias", outputs) if has_bias else None
        return weight, bias if self._part.rank == 0 else None

    def _levels(self, names: list[str], shapes: list[tuple[int, ...]]) -> Levels | None:
        """Of quantized projections of one kind, this rank's outputs; None: they are not that."""
        found = []
        for name, shape in zip(names, shapes, strict=True):
            if (levels := self._checkpoint.levels(name, shape)) is None:
                return None
            found.append(levels.of_outputs(self._part.of(shape[0])))
        return together(found)

    def _packed(
        self, names: list[str], shapes: list[tuple[int, ...]], divided: bool = False
    ) -> Tensor:
        """`divided`: of each tensor this rank's rows."""
        size = self._part.size if divided else 1
        rows = sum(shape[0] for shape in shapes) // size
        packed = self._empty(rows, *shapes[0][1:])
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            cut = (self._part.of(shape[0]),) if size > 1 else ()
            end = start + shape[0] // size
            packed[start:end].copy_(self._checkpoint.read(name, shape, cut))
            start = end
        return packed

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _vector(self, name: str, size: int) -> Tensor:
        return self._packed([name], [(size,)])


def _plain(weight: Tensor | Levels) -> Tensor:
    return weight.plain() if isinstance(weight, Levels) else weight
