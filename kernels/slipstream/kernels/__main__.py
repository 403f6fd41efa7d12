"""`python -m slipstream.kernels`: all kernels for every CPU of this kind, so that an image needs no
compiler and serves wherever it is started."""

import platform
import sys

from slipstream.kernels import cpu, verified_copy
from slipstream.kernels.build import LEVELS, BuildError, default_cache_dir


def main() -> int:
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


if __name__ == "__main__":
    sys.exit(main())
