"""The compiled CPU kernels: built once by the system's C++ compiler, loaded through ctypes.

A plain C interface keeps torch's headers out of it, so that building takes seconds and one build
serves every torch version. Without a compiler the reference serves, and says so loudly.
"""

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

from slipstream.kernels.build import BuildError, Level, build, default_cache_dir, one_line, wanted

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu_program.cpp")
_PARTS = ("vector", "hadamard", "matmul", "adapters", "attention", "team", "draw")
_HEADERS = tuple(_SOURCE.with_name(f"cpu_{n}.h") for n in _PARTS)
_FLAGS = ("-ffp-contract=fast", "-fopenmp-simd", "-pthread")

_P, _I, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "team_new": (_P, (_N, _I)),
    "team_delete": (None, (_P,)),
    "program_new": (_P, (_P, _P, _I)),
    "program_delete": (None, (_P,)),
    "program_run": (None, (_P, _P, _P)),
    "draw": (None, (_P, _P, _I, _P, _I)),
}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None if `SLIPSTREAM_CPU_KERNELS=0`, or if they cannot be built."""
    if not wanted():
        return None
    try:
        return load(default_cache_dir())
    except BuildError as error:
        _LOG.warning("SLOW: no CPU kernels, plain torch serves instead: %s", error)
        return None


def built(cache_dir: Path, level: Level | None = None) -> Path:
    """As `build.build`."""
    return build(cache_dir, _SOURCE, _HEADERS, _FLAGS, ("-pthread",), level)


def load(cache_dir: Path) -> ctypes.CDLL:
    """Builds the kernels, unless `cache_dir` has this build already, and loads them.

    BuildError: no compiler, or it failed, or the folder cannot be written.
    """
    try:
        library = ctypes.CDLL(str(built(cache_dir)))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(one_line(error)) from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
