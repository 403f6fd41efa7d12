"""`python -m slipstream.kernels`: all kernels for every CPU of this kind, so that an image needs no
compiler and serves wherever it is started. `tune`: how this GPU launches its own, into a file."""

import argparse
import platform
import sys
from pathlib import Path

from slipstream.kernels import cpu, verified_copy
from slipstream.kernels.build import LEVELS, BuildError, default_cache_dir


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m slipstream.kernels", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["build", "tune"], default="build")
    parser.add_argument("--out", type=Path, help="folder for the card's file")
    options = parser.parse_args()
    return _tune(options.out) if options.what == "tune" else _build()


def _build() -> int:
    folder = default_cache_dir()
    for level in LEVELS:
        if level.features and platform.machine() not in ("x86_64", "AMD64"):
            continue
        try:
            for library in (cpu.built(folder, level), verified_copy.built(folder, level)):
                print(library, flush=True)
        except (BuildError, OSError) as error:
            print(f"python -m slipstream.kernels: {error}", file=sys.stderr)
            return 1
    return 0


def _tune(folder: Path | None) -> int:
    try:
        # Imported here: an image for CPUs has no Triton.
        import torch

        from slipstream.kernels.gpu.tune import tune
        from slipstream.kernels.gpu.tuning import FOLDER
    except ImportError as error:
        print(f"python -m slipstream.kernels: {error}; install slipstream[gpu]", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("python -m slipstream.kernels: there is no GPU to tune for", file=sys.stderr)
        return 1
    try:
        print(tune(folder or FOLDER))
    except OSError as error:
        print(f"python -m slipstream.kernels: {error}; give --out FOLDER", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
