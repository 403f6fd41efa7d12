"""C++ beside these files, built once by the system's compiler and found again; needs no torch."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-strict-aliasing")
"""Words of several numbers are stored as one type of vector and read as another."""
VARIABLE = "SLIPSTREAM_CPU_KERNELS"
"""In the environment: the name of a level instead of the best one; 0: no compiled kernels; triton:
the GPU's kernels in Triton's interpreter, for tests."""
_INTERPRETED = "triton"
_TIMEOUT_S = 120


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; one line that says why."""


class Level(NamedTuple):
    """A build for CPUs that have at least these features, in the words of /proc/cpuinfo."""

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]


_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = (
    Level(
        "avx512-bf16",
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        _V4 | {"avx512_bf16", "avx512_vnni"},
    ),
    Level("avx512-vnni", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"}),
    Level("avx512", ("-march=x86-64-v4",), _V4),
    Level("avx2", ("-march=x86-64-v3",), _V3),
    Level("portable", (), frozenset()),
)
"""Best first. The last one runs on any CPU, with the vectors that its kind always has."""


def chosen_level() -> Level:
    """The best one that this CPU can run, or the one that the environment names.

    BuildError: there is no such level, or not for this CPU.
    """
    here = cpu_features()
    name = os.environ.get(VARIABLE)
    if not name or not wanted() or interpreted():
        return next(level for level in LEVELS if level.features <= here)
    level = next((level for level in LEVELS if level.name == name), None)
    if level is None:
        names = ", ".join(level.name for level in LEVELS)
        raise BuildError(f"{VARIABLE} is {name!r}; it can be 0, triton, {names}")
    if missing := sorted(level.features - here):
        raise BuildError(f"{VARIABLE} is {name!r}, but this CPU has no {', '.join(missing)}")
    return level


@functools.cache
def cpu_features() -> frozenset[str]:
    """As the kernel names them; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(words.split())


def wanted() -> bool:
    """Not with `SLIPSTREAM_CPU_KERNELS=0`."""
    return os.environ.get(VARIABLE) != "0"


def interpreted() -> bool:
    """With `SLIPSTREAM_CPU_KERNELS=triton`. Triton, which asks when it is imported, is told so."""
    if os.environ.get(VARIABLE) != _INTERPRETED:
        return False
    os.environ["TRITON_INTERPRET"] = "1"
    return True


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slipstream" / "kernels"


def build(
    cache_dir: Path,
    source: Path,
    headers: Sequence[Path],
    flags: Sequence[str],
    link: Sequence[str],
    level: Level | None = None,
) -> Path:
    """The shared library of `source`, made unless `cache_dir` has this build already; for this CPU
    unless `level` says for which.

    BuildError: no compiler, or it failed; see `chosen_level` too. OSError: the folder is read-only.
    """
    level = level or chosen_level()
    flags, link = (*FLAGS, *level.flags, *flags), ("-shared", *link)
    key = _build_key((source, *headers), (*flags, *link))
    path = cache_dir / f"{source.stem}-{level.name}-{key}.so"
    if path.exists():
        return path
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++) in PATH")
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Several workers may start at once: each builds in its own folder, and the rename is atomic.
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        object_file, library = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _compile([compiler, *flags, "-c", str(source), "-o", str(object_file)])
        _compile([compiler, str(object_file), *link, "-o", str(library)])
        os.replace(library, path)
    return path


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {one_line(done.stderr)}")


def _build_key(files: Sequence[Path], flags: Sequence[str]) -> str:
    """Changes with what is compiled, how and for which C library, not with the compiler's version:
    a host that has none uses what was built elsewhere."""
    built_for = platform.machine(), *platform.libc_ver(), os.environ.get("CXX", "")
    parts = [*(file.read_text() for file in files), *flags, *built_for]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def one_line(message: object) -> str:
    return " ".join(str(message).split())[:300]
