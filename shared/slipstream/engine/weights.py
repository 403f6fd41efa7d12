"""Safetensors checkpoints -> the decoder's parameters. Only this file knows their names.

Files are mapped into memory, checked against the config, converted and packed; no pickle is ever
read.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.engine.decoder import DecoderWeights, LayerWeights
from slipstream.engine.families import ExpertsConfig
from slipstream.engine.model_config import ModelConfig, ModelError, weight_files
from slipstream.engine.ranks import Part
from slipstream.kernels.ops import Backend, Experts, SharedExpert

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

SAID_EVERY_S = 2.0
_LOG = logging.getLogger(__name__)
_Cut: TypeAlias = tuple[slice, ...]
"""Of each dimension, from the first on; none: all."""
_Projection: TypeAlias = tuple[Tensor, Tensor | None]
"""Weight and bias."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    with _open_checkpoint(Path(model_path), device) as checkpoint:
        weights = _Loader(checkpoint, config, *how).load(progress)
        if unread := checkpoint.unread(config.tied_embeddings):
            raise ModelError(f"{model_path}: config.json does not account for tensor {unread[0]}")
        return weights


class _Source(Protocol):
    def read(self, name: str, shape: tuple[int, ...], cut: _Cut = ()) -> Tensor:
        """`cut` of the tensor, which has this shape."""

    def skip(self, name: str) -> None:
        """All of it is other ranks'."""


class _Dummies:
    """Random weights of a size that keeps activations small; a name's are the same in every
    process and for every part, on devices of one kind."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def skip(self, name: str) -> None:
        pass

    def read(self, name: str, shape: tuple[int, ...], cut: _Cut = ()) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, device=self._device)[cut]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        generator = torch.Generator(self._device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=self._device)
        return drawn.mul_(shape[-1] ** -0.5)[cut]


class _Checkpoint:
    """Tensors by name over one or several files."""

    def __init__(self, folder: Path, files: dict[Path, Any]) -> None:
        self.folder = folder
        self._file_of = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
        self._files = files
        self._unread = set(self._file_of)

    def unread(self, tied_embeddings: bool) -> list[str]:
        """Names that nothing asked for, but for those that Transformers does not read either."""
        ignored = {"lm_head.weight"} if tied_embeddings else set()
        names = self._unread - ignored
        return sorted(name for name in names if not name.endswith(".rotary_emb.inv_freq"))

    def skip(self, name: str) -> None:
        self._unread.discard(name)

    def read(self, name: str, shape: tuple[int, ...], cut: _Cut = ()) -> Tensor:
        path = self._file_of.get(name)
        if path is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        self._unread.discard(name)
        try:
            stored = self._files[path].get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise ModelError(
                    f"{path}: {name} has shape {stored.get_shape()}, config.json says {list(shape)}"
                )
            tensor: Tensor = stored[cut] if cut else self._files[path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{path}: {name}: {error}") from error
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{path}: {name} is {tensor.dtype}, which is not supported")
        return tensor


def _opened(path: Path, device: torch.device) -> Any:
    """Tensors come straight to the device."""
    return safe_open(str(path), framework="pt", device=str(device))


@contextmanager
def _open_checkpoint(folder: Path, device: torch.device) -> Iterator[_Checkpoint]:
    files = weight_files(folder)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for path in files:
            try:
                opened[path] = stack.enter_context(_opened(path, device))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: {error}") from error
        yield _Checkpoint(folder, opened)


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
        table = self._packed(["model.embed_tokens.weight"], [vocabulary])
        head = embedding = self._backend.table(table)
        if not config.tied_embeddings:
            head = self._backend.pack(self._packed(["lm_head.weight"], [vocabulary]))
        elif self._backend.int8:
            head = self._backend.pack(table)
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
            shared = SharedExpert(both[0][0], both[1][0], gate_of_all)
        return Experts(
            router=self._packed([f"{mlp}.gate.weight"], [(config.count, hidden)]),
            gate_up=gate_ups,
            down=downs,
            first=own.start,
            top_k=config.top_k,
            normalized=config.normalized,
            shared=shared,
        )

    def _linear(
        self, parts: list[tuple[str, int]], inputs: int, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Projections with the same input, one under the other in the order given; of each this
        rank's outputs."""
        names, sizes = [name for name, _ in parts], [size for _, size in parts]
        shapes: list[tuple[int, ...]] = [(size, inputs) for size in sizes]
        weight = self._packed([f"{name}.weight" for name in names], shapes, divided=True)
        if not has_bias:
            return weight, None
        biases = [f"{name}.bias" for name in names]
        return weight, self._packed(biases, [(size,) for size in sizes], divided=True)

    def _partial(
        self, projection: tuple[str, int], inputs: int, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A projection of this rank's inputs; the ranks' results are to be added, so that one rank
        alone has the bias."""
        name, outputs = projection
        cut = () if self._part.size == 1 else (slice(None), self._part.of(inputs))
        read = self._checkpoint.read(f"{name}.weight", (outputs, inputs), cut)
        weight = self._empty(*read.shape).copy_(read)
        bias = self._vector(f"{name}.bias", outputs) if has_bias else None
        return weight, bias if self._part.rank == 0 else None

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
