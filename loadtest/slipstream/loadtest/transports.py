"""GB/s of each transport between two processes of this machine, beside those of a memory copy.

    python -m slipstream.loadtest.transports [--mib 256] [--block-kib 360] [--repeats 9]

A ratio counts only within one run. UCX_TLS in the environment changes what nixl runs over.
"""

import argparse
import tempfile
from pathlib import Path

from slipstream.kv.probe import Row, measure_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="size of the pool that is read")
    parser.add_argument("--block-kib", type=int, default=360)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    block_bytes = options.block_kib << 10
    num_blocks = (options.mib << 20) // block_bytes
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        memcpy, rows = measure_all(Path(folder), num_blocks, block_bytes, options.repeats)
    print(f"{num_blocks} blocks of {options.block_kib} KiB, best of {options.repeats}")
    print(f"{'':<10}{'verified':>10}{'':>7}{'bare':>10}   GB/s, and of memcpy")
    print(f"{'memcpy':<10}{'':>17}{memcpy:>10.2f}")
    for row in rows:
        print(_line(row, memcpy))


def _line(row: Row, memcpy: float) -> str:
    if row.reason:
        return f"{row.name:<10}{row.reason}"
    shares = (f"{rate:>10.2f}{rate / memcpy:>6.0%} " for rate in (row.verified, row.bare))
    return f"{row.name:<10}{''.join(shares)}"


if __name__ == "__main__":
    main()
