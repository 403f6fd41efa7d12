"""The compiled CPU kernels: built once by the system's C++ compiler, loaded through ctypes.

A plain C interface keeps torch's headers out of it, so that building takes two seconds and one
build serves every torch version. Without a compiler the reference serves, and says so loudly.
"""

import ctypes
import functools
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from slipstream.kernels import reference
from slipstream.kernels.build import BuildError, build, default_cache_dir, one_line, wanted

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_HEADER = Path(__file__).with_name("cpu_vector.h")
_LANES = 16

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "rms_norm": (_P, _P, _P, _P, _I, _I, _I, _I, _F, _N),
    "silu_and_mul": (_P, _P, _I, _I, _N),
    "rotary": (_P, _P, _P, _I, _I, _I, _I, _N),
    "write_kv": (_P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _I),
    "paged_attention": (_P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _I, _I, _F, _N),
}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def kernels() -> "CpuKernels | None":
    """The compiled kernels; None if `SLIPSTREAM_CPU_KERNELS=0`, or if they cannot be built."""
    if not wanted():
        return None
    try:
        return CpuKernels(load(default_cache_dir()))
    except BuildError as error:
        _LOG.warning("SLOW: no CPU kernels, plain torch serves instead: %s", error)
        return None


def load(cache_dir: Path) -> ctypes.CDLL:
    """Builds the kernels, unless `cache_dir` has this build already, and loads them.

    BuildError: no compiler, or it failed, or the folder cannot be written.
    """
    openmp = _torch_openmp()
    try:
        link = ("-fopenmp",) if openmp is None else ()
        path = build(cache_dir, _SOURCE, (_HEADER,), ("-fopenmp",), link)
        if openmp is not None:
            # Two OpenMP runtimes in a process fight for the cores: use the one that torch runs on.
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(one_line(error)) from error
    for name, argtypes in _SIGNATURES.items():
        for dtype in _DTYPES.values():
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = argtypes, None
    return library


def _torch_openmp() -> Path | None:
    folder = Path(torch.__file__).parent
    found = sorted([*folder.glob("lib/libgomp*.so*"), *folder.glob("../torch.libs/libgomp*.so*")])
    return found[0] if found else None


class CpuKernels:
    """The operations of `ops` on the compiled library.

    What it does not cover goes to the reference: rows that are no multiple of 16 elements, blocks
    that do not have 16 tokens.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {
            (name, dtype): getattr(library, f"{name}_{suffix}")
            for name in _SIGNATURES
            for dtype, suffix in _DTYPES.items()
        }

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        dim = x.shape[-1]
        function = self._functions.get(("rms_norm", x.dtype))
        if function is None or dim % _LANES or not _packed(x) or weight.dtype != x.dtype:
            return reference.rms_norm(x, weight, epsilon, residual)
        assert weight.is_contiguous() and weight.shape == (dim,)
        assert residual is None or (residual.is_contiguous() and residual.shape == x.shape)
        out = torch.empty(x.shape, dtype=x.dtype)
        function(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1] if x.dim() == 3 else 1,
            dim,
            x.stride(0),
            epsilon,
            torch.get_num_threads(),
        )
        return out

    def silu_and_mul(self, x: Tensor) -> Tensor:
        tokens, width = x.shape
        function = self._functions.get(("silu_and_mul", x.dtype))
        if function is None or width % (2 * _LANES) or not x.is_contiguous():
            return reference.silu_and_mul(x)
        out = torch.empty((tokens, width // 2), dtype=x.dtype)
        function(x.data_ptr(), out.data_ptr(), tokens, width // 2, torch.get_num_threads())
        return out

    def rotary(self, x: Tensor, cosine: Tensor, sine: Tensor) -> None:
        tokens, heads, dim = x.shape
        function = self._functions.get(("rotary", x.dtype))
        if function is None or not _packed(x):
            return reference.rotary(x, cosine, sine)
        assert cosine.shape == sine.shape == (tokens, dim // 2)
        assert cosine.is_contiguous() and sine.is_contiguous()
        assert cosine.dtype == sine.dtype == torch.float32
        function(
            x.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            tokens,
            heads,
            dim,
            x.stride(0),
            torch.get_num_threads(),
        )

    def write_kv(self, key: Tensor, value: Tensor, pool: Tensor, layer: int, slots: Tensor) -> None:
        function = self._functions.get(("write_kv", key.dtype))
        packed = _packed(key) and _packed(value) and key.dtype == value.dtype
        if function is None or not packed or not _readable(pool, key):
            return reference.write_kv(key, value, pool, layer, slots)
        tokens, heads, dim = key.shape
        assert heads == pool.shape[3] and slots.dtype == torch.int64 and slots.is_contiguous()
        function(
            key.data_ptr(),
            value.data_ptr(),
            pool.data_ptr(),
            slots.data_ptr(),
            tokens,
            key.stride(0),
            value.stride(0),
            heads,
            dim,
            pool.stride(0),
            layer * pool.stride(1),
        )

    def paged_attention(
        self,
        query: Tensor,
        pool: Tensor,
        layer: int,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lengths: Tensor,
        scale: float,
    ) -> Tensor:
        tokens, heads, dim = query.shape
        function = self._functions.get(("paged_attention", query.dtype))
        if function is None or dim % _LANES or not _packed(query) or not _readable(pool, query):
            return reference.paged_attention(
                query, pool, layer, block_tables, query_starts, context_lengths, scale
            )
        assert block_tables.dtype == query_starts.dtype == context_lengths.dtype == torch.int32
        assert block_tables.is_contiguous() and heads % pool.shape[3] == 0
        out = torch.empty((tokens, heads, dim), dtype=query.dtype)
        function(
            query.data_ptr(),
            out.data_ptr(),
            pool.data_ptr(),
            block_tables.data_ptr(),
            query_starts.data_ptr(),
            context_lengths.data_ptr(),
            block_tables.shape[0],
            block_tables.shape[1],
            heads,
            pool.shape[3],
            dim,
            query.stride(0),
            pool.stride(0),
            layer * pool.stride(1),
            scale,
            torch.get_num_threads(),
        )
        return out


def _packed(x: Tensor) -> bool:
    """Is everything behind the token dimension contiguous?"""
    if x.dim() == 2:
        return x.stride(1) == 1
    return x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _readable(pool: Tensor, x: Tensor) -> bool:
    same = pool.dtype == x.dtype and pool.shape[5] == x.shape[2]
    return same and pool.shape[4] == _LANES and pool.is_contiguous()
