"""LoRA adapters in a worker's memory: read in a thread, put in their places between steps."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from slipstream.config import format_bytes
from slipstream.core.machine import AdapterRead
from slipstream.engine.lora import (
    NAME_CHARACTERS_MAX,
    AdapterError,
    LoraLimits,
    Low,
    read_lora,
)
from slipstream.errors import ErrorCode, Problem
from slipstream.kernels.ops import NO_ADAPTER, ForwardBatch
from slipstream.messages import AdapterInfo


class PackedAdapter(Protocol):
    """All of one adapter, as its model wants it."""

    @property
    def num_bytes(self) -> int: ...


class ModelAdapters(Protocol):
    """What adapters add to one model."""

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Outputs and inputs of the matrices that may be added to, by the checkpoint's names."""

    def pack(self, lows: Mapping[str, Low]) -> PackedAdapter:
        """Any thread."""

    def put(self, place: int, packed: Any | None) -> None:
        """For the next steps; None: the place is free."""


class AdaptableModel(Protocol):
    def adapters(self, places: int, rank: int) -> ModelAdapters:
        """From now on batches may have adapters. Once, any thread."""


class _Held(NamedTuple):
    info: AdapterInfo
    place: int
    packed: PackedAdapter


def adapter_gone(adapter_id: str) -> Problem:
    message = f"the LoRA adapter {adapter_id} is not loaded in this worker; load it again"
    return Problem(code=ErrorCode.MODEL_NOT_FOUND, message=message, param="model")


class AdapterBook:
    """What any thread may call says so; the rest belongs to that of the steps."""

    def __init__(
        self, model: AdaptableModel, dtype: torch.dtype, limits: LoraLimits, refused: str = ""
    ) -> None:
        """`refused`: why there can be none; empty: there can."""
        self._model, self._dtype, self._limits, self._refused = model, dtype, limits, refused
        self._there: ModelAdapters | None = None
        self._held: dict[str, _Held] = {}
        self._places: dict[str, int] = {}
        """Of those that rows may want."""
        self._lock = threading.Lock()

    def read(self, name: str, path: str) -> AdapterRead:
        """From its folder, packed; it is not used before it is `put`. Any thread, one at a time."""
        try:
            return AdapterRead(name, path, self._read(name, path))
        except AdapterError as error:
            problem = Problem(code=ErrorCode.INVALID_VALUE, message=str(error), param="lora_path")
            return AdapterRead(name, path, problem=problem)

    def _read(self, name: str, path: str) -> AdapterInfo:
        limits = self._limits
        if self._refused:
            raise AdapterError(self._refused)
        if not 1 <= len(name) <= NAME_CHARACTERS_MAX:
            raise AdapterError(
                f"a LoRA adapter's name has 1 to {NAME_CHARACTERS_MAX} characters, not {len(name)}"
            )
        if self._there is None:
            self._there = self._model.adapters(limits.loras, limits.rank)
        lora = read_lora(path, self._there.modules, self._dtype, limits, limits.num_bytes)
        adapter_id = f"{name}@{lora.version}"
        with self._lock:
            if adapter_id in self._held:
                return self._held[adapter_id].info
        packed, left = self._there.pack(lora.modules), self._bytes_left()
        if packed.num_bytes > left:
            raise AdapterError(
                f"{path} needs {format_bytes(packed.num_bytes)}, of --lora-bytes "
                f"{format_bytes(limits.num_bytes)} {format_bytes(left)} are left; unload another "
                "one, or raise it"
            )
        info = AdapterInfo(
            adapter_id=adapter_id,
            name=name,
            path=path,
            rank=lora.rank,
            num_bytes=packed.num_bytes,
        )
        with self._lock:
            taken = {held.place for held in self._held.values()}
            free = sorted(set(range(limits.loras)) - taken)
            if not free:
                raise AdapterError(
                    f"{name}: {limits.loras} LoRA adapters are loaded, which is --max-loras; "
                    "unload one, or raise it"
                )
            self._held[adapter_id] = _Held(info, free[0], packed)
        return info

    def put(self, adapter_id: str) -> None:
        """Rows may want it from now on."""
        with self._lock:
            held = self._held[adapter_id]
        assert self._there is not None
        self._there.put(held.place, held.packed)
        self._places[adapter_id] = held.place

    def leave(self, adapter_id: str) -> int | None:
        """It is to be dropped: who reads it from now on reads it anew. Its place, if it has one.
        Any thread."""
        with self._lock:
            held = self._held.pop(adapter_id, None)
        return None if held is None else held.place

    def drop(self, adapter_id: str, place: int | None) -> None:
        """Gives the memory of what `leave` has found back, before anything newer is put there."""
        self._places.pop(adapter_id, None)
        if place is not None and self._there is not None:
            self._there.put(place, None)

    def wanted(
        self, batch: ForwardBatch, ids: Sequence[str], counts: Sequence[int]
    ) -> ForwardBatch:
        """With the adapters of its rows, of `counts` tokens each; of one that is not there none."""
        places = [self._places.get(adapter_id, NO_ADAPTER) for adapter_id in ids]
        if max(places) == NO_ADAPTER:
            return batch
        of_tokens = torch.from_numpy(np.repeat(np.asarray(places, np.int32), counts))
        return replace(batch, adapters=of_tokens.to(batch.tokens.device))

    def has(self, adapter_id: str) -> bool:
        return adapter_id in self._places

    @property
    def num_bytes(self) -> int:
        """Of all that are held. Any thread."""
        with self._lock:
            return sum(held.info.num_bytes for held in self._held.values())

    def _bytes_left(self) -> int:
        return max(0, self._limits.num_bytes - self.num_bytes)
