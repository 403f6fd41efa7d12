"""A model as a program of compiled operations: written down once, then one call for each step.

The call leaves the interpreter lock alone and goes through all operations with a team of threads
(`cpu_program.cpp`). Values become numbered buffers, as few as the order of their uses allows.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from slipstream.kernels import panels
from slipstream.kernels.cpu_adapters import CpuAdapters
from slipstream.kernels.draw import Draw, Drawn, as_tensors
from slipstream.kernels.levels import Levels
from slipstream.kernels.ops import (
    Experts,
    Forward,
    ForwardBatch,
    Heads,
    Model,
    Quantization,
)
from slipstream.kernels.panels import PANEL, Packed

MAX_OPS = 1 << 14
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_P, _I, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_D, _F = ctypes.c_double, ctypes.c_float


class Kind(IntEnum):
    EMBED = 0
    TAKE = 1
    NORM = 2
    QUANTIZE = 3
    LINEAR = 4
    GATED = 5
    ROTATE = 6
    ATTEND = 7
    SHRINK = 8


class Rows(IntEnum):
    TOKENS = 0
    SAMPLES = 1


class _Op(ctypes.Structure):
    """Mirrors `Op` in `cpu_program.cpp`."""

    _fields_ = [
        *((name, _N) for name in ("kind", "dtype", "rows", "wide", "quantized", "turned")),
        *((name, _N) for name in ("input", "residual", "output", "shrunk")),
        *((name, _P) for name in ("weight", "second", "scale", "sums", "adapters", "parts")),
        *((name, _I) for name in ("inputs", "outputs", "heads", "kv_heads", "head_dim", "layer")),
        ("inner", _I),
        ("number", _F),
    ]


class _Step(ctypes.Structure):
    """Mirrors `Step` in `cpu_program.cpp`."""

    _fields_ = [
        *((name, _I) for name in ("tokens", "rows", "samples", "max_blocks")),
        *((name, _P) for name in ("token_ids", "slots", "sample_indices")),
        *((name, _P) for name in ("block_tables", "query_starts", "context_lengths", "adapters")),
        *((name, _P) for name in ("cosine", "sine", "pool")),
        *((name, _I) for name in ("block_stride", "layer_stride")),
        ("buffers", _P),
    ]


class _Draw(ctypes.Structure):
    """Mirrors `Draw` in `cpu_draw.h`."""

    _fields_ = [
        *((name, _I) for name in ("row", "top_k")),
        *((name, _D) for name in ("point", "top_p")),
        *((name, _F) for name in ("temperature", "min_p")),
        *(("token", _I), ("top", _F)),
    ]


@dataclass(slots=True, eq=False)
class Buffer:
    """What an operation yields, before memory is given to it."""

    rows: Rows
    width: int
    dtype: torch.dtype
    last_use: int = 0
    slot: int = -1


class Recorder:
    """Writes down operations."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.ops: list[dict[str, Any]] = []
        self.kept: list[object] = []
        """Whose memory the operations point to."""

    def embed(self, table: Packed) -> Buffer:
        return self._add(
            Kind.EMBED, None, Rows.TOKENS, table.inputs, weight=table.panels, outputs=table.inputs
        )

    def take(self, x: Buffer) -> Buffer:
        return self._add(Kind.TAKE, x, Rows.SAMPLES, x.width, outputs=x.width)

    def rms_norm(
        self, x: Buffer, weight: Tensor, epsilon: float, residual: Buffer | None = None
    ) -> Buffer:
        return self._add(
            Kind.NORM,
            x,
            x.rows,
            x.width,
            residual=residual,
            weight=weight,
            outputs=x.width,
            number=epsilon,
        )

    def linear(
        self, x: Buffer, weights: Packed, wide: bool = False, adapters: CpuAdapters | None = None
    ) -> Buffer:
        out = self._product(Kind.LINEAR, x, weights, adapters, wide=wide)
        out.dtype = torch.float32 if wide else self.dtype
        return out

    def gated(self, x: Buffer, weights: Packed, adapters: CpuAdapters | None = None) -> Buffer:
        return self._product(Kind.GATED, x, weights, adapters)

    def moe(self, x: Buffer, experts: Experts) -> Buffer:
        raise ValueError("there are no compiled kernels for experts")

    def attention(
        self,
        qkv: Buffer,
        heads: Heads,
        layer: int,
        norms: tuple[Tensor, Tensor] | None,
        epsilon: float,
    ) -> Buffer:
        shape: dict[str, Any] = {
            "heads": heads.query,
            "kv_heads": heads.kv,
            "head_dim": heads.dim,
            "layer": layer,
        }
        query_norm, key_norm = norms or (None, None)
        self._write(
            Kind.ROTATE,
            qkv,
            Rows.TOKENS,
            None,
            weight=query_norm,
            second=key_norm,
            number=epsilon,
            outputs=qkv.width,
            **shape,
        )
        width = heads.query * heads.dim
        return self._add(Kind.ATTEND, qkv, Rows.TOKENS, width, number=heads.dim**-0.5, **shape)

    def _product(
        self, kind: Kind, x: Buffer, weights: Packed, adapters: CpuAdapters | None, **fields: Any
    ) -> Buffer:
        scales = None
        if adapters is not None:
            self.kept.append(adapters)
            shrunk = Buffer(x.rows, adapters.width, torch.float32)
            table: dict[str, Any] = {"adapters": adapters.table, "inner": adapters.width}
            self._write(Kind.SHRINK, x, x.rows, shrunk, inputs=x.width, **table)
            fields |= {"shrunk": shrunk, "parts": adapters.part_of, **table}
        if weights.scale is not None:
            levels = Buffer(x.rows, x.width, torch.uint8)
            scales = Buffer(x.rows, 1, torch.float32)
            self._write(
                Kind.QUANTIZE, x, x.rows, levels, scales, inputs=x.width, turned=weights.turned
            )
            x = levels
        return self._add(
            kind,
            x,
            x.rows,
            weights.outputs,
            residual=scales,
            weight=weights.panels,
            second=weights.bias,
            quantized=weights.scale is not None,
            scale=weights.scale,
            sums=weights.sums,
            inputs=weights.inputs,
            outputs=weights.outputs,
            **fields,
        )

    def _add(self, kind: Kind, x: Buffer | None, rows: Rows, width: int, **fields: Any) -> Buffer:
        out = Buffer(rows, width, self.dtype)
        self._write(kind, x, rows, out, **fields)
        return out

    def _write(
        self,
        kind: Kind,
        x: Buffer | None,
        rows: Rows,
        out: Buffer | None,
        residual: Buffer | None = None,
        shrunk: Buffer | None = None,
        **fields: Any,
    ) -> None:
        for name, value in fields.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                self.kept.append(value)
                fields[name] = value.data_ptr()
        buffers = {"input": x, "residual": residual, "output": out, "shrunk": shrunk}
        for used in buffers.values():
            if used is not None:
                used.last_use = len(self.ops)
        self.ops.append({"kind": kind, "rows": rows, **buffers, **fields})


class Program:
    """A recorded model. Not thread-safe; its result lives until the next call."""

    def __init__(self, backend: "CpuBackend", recorder: Recorder, result: Buffer) -> None:
        self._backend, self._recorder, self._result = backend, recorder, result
        result.last_use = len(recorder.ops)
        self._slots = _assign(recorder)
        self._memory: list[Tensor] = []
        self._pointers = (_P * len(self._slots))()
        self._capacity = 0
        self.clock_ns: ctypes.Array[ctypes.c_int64] | None = None
        """For measurements, of a length one more than `ops`: by the monotonic clock, when a call
        began and when each operation had ended."""
        self.ops = recorder.ops
        ops = (_Op * len(recorder.ops))(*(self._op(fields) for fields in recorder.ops))
        self._handle = backend.library.program_new(backend.team, ops, len(ops))

    def __call__(self, batch: ForwardBatch, cosine: Tensor, sine: Tensor, pool: Tensor) -> Tensor:
        tokens, samples = batch.tokens.shape[0], batch.sample_indices.shape[0]
        assert pool.is_contiguous() and pool.dtype == self._recorder.dtype
        assert pool.shape[4] == PANEL, "a block of keys is one vector"
        self._reserve(tokens)
        step = _Step(
            tokens=tokens,
            rows=batch.context_lengths.shape[0],
            samples=samples,
            max_blocks=batch.block_tables.shape[1],
            token_ids=batch.tokens.data_ptr(),
            slots=batch.slots.data_ptr(),
            sample_indices=batch.sample_indices.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            query_starts=batch.query_starts.data_ptr(),
            context_lengths=batch.context_lengths.data_ptr(),
            adapters=None if batch.adapters is None else batch.adapters.data_ptr(),
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            pool=pool.data_ptr(),
            block_stride=pool.stride(0),
            layer_stride=pool.stride(1),
            buffers=ctypes.addressof(self._pointers),
        )
        self._backend.library.program_run(self._handle, ctypes.byref(step), self.clock_ns)
        rows = tokens if self._result.rows is Rows.TOKENS else samples
        return self._memory[self._result.slot][:rows]

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._backend.library.program_delete(self._handle)

    def _reserve(self, tokens: int) -> None:
        """Buffers for so many rows; they only grow. There are never more samples than tokens."""
        if tokens <= self._capacity:
            return
        self._capacity = 1 << (tokens - 1).bit_length()
        self._memory = [torch.empty(self._capacity, s.width, dtype=s.dtype) for s in self._slots]
        for index, memory in enumerate(self._memory):
            self._pointers[index] = memory.data_ptr()

    def _op(self, fields: dict[str, Any]) -> _Op:
        buffers = {
            name: -1 if fields[name] is None else fields[name].slot
            for name in ("input", "residual", "output", "shrunk")
        }
        return _Op(**{**fields, **buffers, "dtype": _DTYPES[self._recorder.dtype]})


def _assign(recorder: Recorder) -> list[Buffer]:
    """A slot for each value, one that nobody uses any more if there is any; the first of each."""
    slots: list[Buffer] = []
    busy: dict[int, Buffer] = {}
    for index, fields in enumerate(recorder.ops):
        for new in (fields["residual"], fields["output"]):
            if new is None or new.slot >= 0:
                continue
            alike = (
                slot
                for slot, first in enumerate(slots)
                if (first.rows, first.width, first.dtype) == (new.rows, new.width, new.dtype)
                and busy[slot].last_use < index
            )
            new.slot = next(alike, len(slots))
            if new.slot == len(slots):
                slots.append(new)
            busy[new.slot] = new
    return slots


class CpuBackend:
    """Programs that share one team of threads."""

    def __init__(
        self,
        library: ctypes.CDLL,
        threads: int,
        dtype: torch.dtype,
        quantization: Quantization = "none",
    ) -> None:
        """Of `quantization` not fp8: the reference serves that on a CPU."""
        assert quantization != "fp8"
        self.library, self.dtype = library, dtype
        self.quantization: Quantization = quantization
        self.team = library.team_new(threads, MAX_OPS)

    def __del__(self) -> None:
        if hasattr(self, "team"):
            self.library.team_delete(self.team)

    def table(self, weight: Tensor) -> Packed:
        return panels.plain(weight, None)

    def pack(self, weight: Tensor | Levels, bias: Tensor | None = None) -> Packed:
        if isinstance(weight, Levels):
            if weight.rows:
                return panels.of_bytes(weight.levels, weight.scale, bias, turned=False)
            return panels.plain(weight.plain(), bias)
        if self.quantization == "none":
            return panels.plain(weight, bias)
        return panels.quantized(weight, bias)

    def pack_gated(self, weight: Tensor | Levels, bias: Tensor | None = None) -> Packed:
        """Panels of gate and up by turns, so that a thread has both."""
        turns = panels.by_turns(weight.outputs if isinstance(weight, Levels) else len(weight))
        mixed = weight.of_outputs(turns) if isinstance(weight, Levels) else weight[turns]
        packed = self.pack(mixed, None if bias is None else bias[turns])
        return replace(packed, outputs=packed.outputs // 2)

    def adapters(
        self, parts: Sequence[int], inputs: int, places: int, rank: int, gated: bool = False
    ) -> CpuAdapters:
        return CpuAdapters(parts, places, rank, gated)

    def compile(self, model: Model) -> Forward:
        recorder = Recorder(self.dtype)
        return Program(self, recorder, model(recorder))

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        assert logits.is_contiguous() and logits.dtype == torch.float32
        assert all(0 <= each.row < len(logits) for each in draws)
        wanted = (_Draw * len(draws))(*(_Draw(**each._asdict()) for each in draws))
        self.library.draw(self.team, logits.data_ptr(), logits.shape[1], wanted, len(draws))
        return [Drawn(each.token, each.top) for each in wanted]

    def draw_async(self, logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        return as_tensors(self.draw(logits, draws), logits.device)
