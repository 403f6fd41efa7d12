"""LoRA adapters for the native decoder: modules of a checkpoint -> parts of its packed matrices."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from slipstream.engine.lora import Low
from slipstream.engine.model_config import ModelConfig
from slipstream.kernels.ops import Adapters, Backend, LowRank, PackedLowRank


class LayerAdapters(NamedTuple):
    """Of one layer's matrices, as `LayerWeights` has them."""

    qkv: Adapters | None = None
    output: Adapters | None = None
    gate_up: Adapters | None = None
    """None: there are experts."""
    down: Adapters | None = None


class _Matrix(NamedTuple):
    parts: tuple[str, ...]
    """Modules that lie in it one under the other."""
    sizes: tuple[int, ...]
    inputs: int
    adapters: Adapters


class PackedModules(NamedTuple):
    matrices: tuple[PackedLowRank | None, ...]

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.matrices if each is not None)


class NativeAdapters:
    def __init__(self, config: ModelConfig, backend: Backend, places: int, rank: int) -> None:
        self._config, self._backend, self._room = config, backend, (places, rank)
        self._matrices: list[_Matrix] = []
        self.layers = tuple(self._layer(index) for index in range(config.num_layers))
        self.modules = {
            name: (size, matrix.inputs)
            for matrix in self._matrices
            for name, size in zip(matrix.parts, matrix.sizes, strict=True)
        }

    def pack(self, lows: Mapping[str, Low]) -> PackedModules:
        packed = []
        for matrix in self._matrices:
            low = _stacked([lows.get(name) for name in matrix.parts], matrix.sizes, matrix.inputs)
            packed.append(None if low is None else matrix.adapters.pack(low))
        return PackedModules(tuple(packed))

    def put(self, place: int, packed: PackedModules | None) -> None:
        for index, matrix in enumerate(self._matrices):
            matrix.adapters.put(place, None if packed is None else packed.matrices[index])

    def _layer(self, index: int) -> LayerAdapters:
        config, at = self._config, f"model.layers.{index}"
        hidden, inner = config.hidden_size, config.intermediate_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = {"q": query, "k": key, "v": key}
        qkv = self._matrix(f"{at}.self_attn", attention, hidden)
        output = self._matrix(f"{at}.self_attn", {"o": hidden}, query)
        if config.experts is not None and index in config.experts.layers:
            return LayerAdapters(qkv, output)
        gate_up = self._matrix(f"{at}.mlp", {"gate": inner, "up": inner}, hidden, gated=True)
        return LayerAdapters(
            qkv, output, gate_up, self._matrix(f"{at}.mlp", {"down": hidden}, inner)
        )

    def _matrix(
        self, at: str, parts: Mapping[str, int], inputs: int, gated: bool = False
    ) -> Adapters:
        sizes = tuple(parts.values())
        adapters = self._backend.adapters(sizes, inputs, *self._room, gated)
        names = tuple(f"{at}.{part}_proj" for part in parts)
        self._matrices.append(_Matrix(names, sizes, inputs, adapters))
        return adapters


def _stacked(lows: Sequence[Low | None], sizes: Sequence[int], inputs: int) -> LowRank | None:
    """Of one matrix: parts of which nothing is added to, or that have a lower rank, are filled up
    with zeros."""
    there = [low for low in lows if low is not None]
    if not there:
        return None
    rank, dtype = max(len(low.down) for low in there), there[0].down.dtype
    down = torch.zeros(len(lows), rank, inputs, dtype=dtype)
    ups = [torch.zeros(size, rank, dtype=dtype) for size in sizes]
    for part, low in enumerate(lows):
        if low is not None:
            down[part, : len(low.down)] = low.down
            ups[part][:, : len(low.down)] = low.up
    scale = torch.tensor([low.scale if low else 0.0 for low in lows])
    return LowRank(down.flatten(0, 1), torch.cat(ups), scale)
