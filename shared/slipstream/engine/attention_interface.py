"""Where Transformers' modelling code and our KV blocks meet: its attention and mask interfaces.

A layer hands its queries, keys and values to `_attention` and what it masks to `_mask`. What these
do is said by the `Step` that is on: `Probe` finds out what a model asks for, `Paged` gives it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from slipstream.engine.model_config import ModelError, Reach
from slipstream.kernels.ops import ForwardBatch, Scoring
from slipstream.kernels.reference import attend

NAME = "slipstream"
"""What a model's `_attn_implementation` is while we run it."""

Sees: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of batch index, head, position of the query and of the key: may the one see the other?"""


class RefusedError(ModelError):
    """Why a model cannot run on KV blocks: a clause, for somebody's line."""


class Step(Protocol):
    def mask(self, sees: Sees, size: int | None) -> object:
        """What layers get as their mask. `size`: of the window or chunk, if it is one."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, how: Scoring
    ) -> Tensor:
        """The next layer's attention: all `[T, its heads, head_dim]`, as is what it returns."""


_OTHER = Reach(window=-1)
"""The mask of layers that see neither all before them, nor a window or a chunk of that."""
_step: ContextVar[Step] = ContextVar("step")


@contextmanager
def during(step: Step) -> Iterator[None]:
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """All tensors are `[1, heads, T, head_dim]`. Windows are in the mask as well."""
    how = Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    return _step.get().attend(queries, keys, values, attention_mask, how)[None], None


def _mask(*, mask_function: Sees, local_size: int | None = None, **_: object) -> object:
    return _step.get().mask(mask_function, local_size)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class Probe:
    """Notes what each layer keeps and sees. On the meta device: nothing is computed."""

    def __init__(self, chunk: int | None) -> None:
        """`chunk`: what the config calls the length of attention's chunks."""
        self.shapes: list[tuple[int, int]] = []
        """KV heads and head_dim of each layer, in the order in which they are called."""
        self.reaches: list[Reach] = []
        self._chunk = chunk

    def mask(self, sees: Sees, size: int | None) -> object:
        """Models make masks that none of their layers takes, so any is allowed."""
        for reach in (Reach(window=size), Reach(chunk=size)) if size else (Reach(),):
            if _agree(sees, reach, self._chunk):
                return reach
        return _OTHER

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, how: Scoring
    ) -> Tensor:
        if mask == _OTHER:
            raise RefusedError("a token sees other tokens than those before it")
        if not isinstance(mask, Reach):
            raise RefusedError("its layers are given masks of its own")
        if key.shape != value.shape or key.shape[2] != query.shape[2]:
            raise RefusedError(
                f"a layer has keys of {key.shape[2]} and values of {value.shape[2]} elements"
            )
        self.shapes.append((key.shape[1], key.shape[2]))
        self.reaches.append(mask)
        return torch.empty_like(query)


def _agree(sees: Sees, reach: Reach, chunk: int | None) -> bool:
    """Asked at the edges of windows and chunks, where the rules differ."""
    size = reach.window or reach.chunk or 1000
    edges = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 1])
    query, key = edges[:, None], edges[None]
    nothing = torch.zeros((), dtype=torch.int64)
    said = sees(nothing, nothing, query, key)
    if said.is_meta:  # chunks are counted from the end of the padding, which lies there
        return reach.chunk == chunk
    wanted = key <= query
    if reach.window:
        wanted = wanted & (key > query - size)
    if reach.chunk:
        wanted = wanted & (key // size == query // size)
    return bool((said.expand(wanted.shape) == wanted).all())


class Paged:
    """Writes keys and values into the pool and attends there."""

    def __init__(self, batch: ForwardBatch, pool: Tensor, reaches: Sequence[Reach]) -> None:
        self._batch, self._pool, self._reaches = batch, pool, reaches
        self._layer = 0

    def mask(self, sees: Sees, size: int | None) -> object:
        """Some value: layers that are given none take shortcuts."""
        return Reach()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, how: Scoring
    ) -> Tensor:
        layer, reach = self._layer, self._reaches[self._layer]
        self._layer += 1
        how = how._replace(window=reach.window, chunk=reach.chunk)
        return attend(self._batch, query, key, value, self._pool, layer, how)
