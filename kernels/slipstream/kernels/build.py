"""C++ beside these files, built once by the system's compiler and found again; needs no torch."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno")
PORTABLE = "portable"
"""As `SLIPSTREAM_CPU_KERNELS`: for any CPU of this kind, without what this one has beyond that."""
_TIMEOUT_S = 120


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; one line that says why."""


def march() -> tuple[str, ...]:
    return () if os.environ.get("SLIPSTREAM_CPU_KERNELS") == PORTABLE else ("-march=native",)


def wanted() -> bool:
    """Not with `SLIPSTREAM_CPU_KERNELS=0`."""
    return os.environ.get("SLIPSTREAM_CPU_KERNELS") != "0"


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slipstream" / "kernels"


def build(
    cache_dir: Path,
    source: Path,
    headers: Sequence[Path],
    flags: Sequence[str],
    link: Sequence[str],
) -> Path:
    """The shared library of `source`, made unless `cache_dir` has this build already.

    BuildError: no compiler, or it failed. OSError: the folder cannot be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++) in PATH")
    flags, link = (*FLAGS, *march(), *flags), ("-shared", *link)
    key = _build_key(compiler, (source, *headers), (*flags, *link))
    path = cache_dir / f"{source.stem.removesuffix('_kernels')}-{key}.so"
    if path.exists():
        return path
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


def _build_key(compiler: str, files: Sequence[Path], flags: Sequence[str]) -> str:
    """Changes with anything that changes the machine code: source, compiler, flags, this CPU."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    parts = [*(file.read_text() for file in files), version, *flags, _cpu_features()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    names = ("flags", "Features", "model name", "cpu family", "model\t")
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(names)}))


def one_line(message: object) -> str:
    return " ".join(str(message).split())[:300]
