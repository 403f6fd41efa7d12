"""LoRA adapters for a model that Transformers computes: hooks behind its linear layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slipstream.engine.lora import Low
from slipstream.kernels.ops import NO_ADAPTER

_SHAPES: dict[type[nn.Module], Callable[[Any], tuple[int, int]]] = {
    nn.Linear: lambda module: (module.out_features, module.in_features),
    Conv1D: lambda module: (module.nf, module.nx),  # GPT-2's, whose weight lies the other way
}
"""What is linear -> its outputs and inputs."""


class PackedLinears(NamedTuple):
    lows: dict[str, Low]

    @property
    def num_bytes(self) -> int:
        return sum(low.down.nbytes + low.up.nbytes for low in self.lows.values())


class ForeignAdapters:
    """Adds to linear layers that a step goes through with a row for each of its tokens; others,
    such as experts' and the vocabulary's, it does not offer."""

    def __init__(self, model: Any, places: int) -> None:
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        self._linears = {
            name: module
            for name, module in model.named_modules()
            if type(module) in _SHAPES and module not in embeddings and ".experts." not in name
        }
        self.modules = {
            name: _SHAPES[type(module)](module) for name, module in self._linears.items()
        }
        self._places: list[dict[str, Low]] = [{} for _ in range(places)]
        self._rows: list[tuple[int, Tensor]] = []
        """Of the step that runs: which tokens want what."""
        self._tokens = 0
        for name, module in self._linears.items():
            module.register_forward_hook(self._hook(name))

    def pack(self, lows: Mapping[str, Low]) -> PackedLinears:
        device = next(iter(self._linears.values())).weight.device
        return PackedLinears(
            {
                name: Low(low.down.to(device), low.up.to(device), low.scale)
                for name, low in lows.items()
            }
        )

    def put(self, place: int, packed: PackedLinears | None) -> None:
        self._places[place] = {} if packed is None else packed.lows

    @contextmanager
    def during(self, wanted: Tensor | None) -> Iterator[None]:
        """`wanted`: as `ForwardBatch.adapters`."""
        try:
            if wanted is not None:
                self._tokens = len(wanted)
                places = sorted(set(wanted.tolist()) - {NO_ADAPTER})
                self._rows = [(place, (wanted == place).nonzero()[:, 0]) for place in places]
            yield
        finally:
            self._rows = []

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            for place, rows in self._rows:
                if (low := self._places[place].get(name)) is None:
                    continue
                x, flat = given[0].flatten(0, -2), out.flatten(0, -2)
                if len(x) != self._tokens:
                    raise RuntimeError(f"{name}: {len(x)} rows for {self._tokens} tokens")
                inner = F.linear(x[rows].float(), low.down.float()) * low.scale
                made = flat[rows].float() + F.linear(inner, low.up.float())
                out = flat.index_copy(0, rows, made.to(out.dtype)).view_as(out)
            return out

        return add
