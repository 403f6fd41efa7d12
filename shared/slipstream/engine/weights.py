"""Safetensors checkpoints -> the decoder's parameters. Only this file knows their names.

Files are mapped into memory, checked against the config, converted and packed; no pickle is ever
read.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.engine.decoder import DecoderWeights, LayerWeights
from slipstream.engine.model_config import ModelConfig, ModelError, weight_files
from slipstream.kernels.ops import Backend

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_weights(
    model_path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    progress: Progress = lambda done, layers: None,
) -> DecoderWeights:
    """All parameters in `dtype`, in memory of our own, matrices as `backend` wants them.

    ModelError, naming the file: truncated or corrupt files, missing tensors, wrong shapes, tensors
    that the config does not account for (a feature that would silently be left out).
    """
    with _open_checkpoint(Path(model_path)) as checkpoint:
        weights = _Loader(checkpoint, config, dtype, device, backend).load(progress)
        if unread := checkpoint.unread(config.tied_embeddings):
            raise ModelError(f"{model_path}: config.json does not account for tensor {unread[0]}")
        return weights


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

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        path = self._file_of.get(name)
        if path is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        self._unread.discard(name)
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{path}: {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{path}: {name} has shape {list(tensor.shape)}, config.json says {list(shape)}"
            )
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{path}: {name} is {tensor.dtype}, which is not supported")
        return tensor


@contextmanager
def _open_checkpoint(folder: Path) -> Iterator[_Checkpoint]:
    files = weight_files(folder)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for path in files:
            try:
                opened[path] = stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: {error}") from error
        yield _Checkpoint(folder, opened)


class _Loader:
    def __init__(
        self,
        checkpoint: _Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        self._checkpoint = checkpoint
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
            yield self._layer(f"model.layers.{index}")

    def _layer(self, at: str) -> LayerWeights:
        config = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        query = config.num_heads * config.head_dim
        key = config.num_kv_heads * config.head_dim
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        qkv = [(f"{attention}.{name}_proj", size) for name, size in zip("qkv", (query, key, key))]  # noqa: B905
        gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
        pack, pack_gated = self._backend.pack, self._backend.pack_gated
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
            output=pack(
                *self._linear([(f"{attention}.o_proj", hidden)], query, config.output_bias)
            ),
            mlp_norm=self._vector(f"{at}.post_attention_layernorm.weight", hidden),
            gate_up=pack_gated(*self._linear(gate_up, hidden, config.mlp_bias)),
            down=pack(*self._linear([(f"{mlp}.down_proj", hidden)], inner, config.mlp_bias)),
        )

    def _linear(
        self, parts: list[tuple[str, int]], inputs: int, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Projections with the same input, one under the other in the order given."""
        names, sizes = [name for name, _ in parts], [size for _, size in parts]
        weight = self._packed([f"{name}.weight" for name in names], [(n, inputs) for n in sizes])
        if not has_bias:
            return weight, None
        bias = self._packed([f"{name}.bias" for name in names], [(size,) for size in sizes])
        return weight, bias

    def _packed(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        rows = sum(shape[0] for shape in shapes)
        packed = torch.empty((rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            packed[start : start + shape[0]].copy_(self._checkpoint.read(name, shape))
            start += shape[0]
        return packed

    def _vector(self, name: str, size: int) -> Tensor:
        return self._packed([name], [(size,)])
