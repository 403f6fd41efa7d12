"""`slipstream doctor transports`: which ways to move KV blocks work here, how fast, and why not."""

import tempfile
from pathlib import Path

import msgspec

from slipstream.cli.commands import TransportsConfig
from slipstream.config import SetupError
from slipstream.kernels.verified_copy import compiled
from slipstream.kv.choice import CLEARLY, best_of
from slipstream.kv.probe import Row, measure_all

REPEATS = 5
_FOR = {
    "cuda_ipc": "pools on GPUs of one host",
    "shm": "one host",
    "nixl": "anywhere; RDMA or TCP, as UCX finds them",
    "bus": "anywhere",
}


class Report(msgspec.Struct, frozen=True):
    """GB/s between two processes of this machine, `verified` with digests, `bare` without."""

    memcpy: float
    compiled: bool
    """Whether copy and digest are one pass; else they are two, in Python."""
    transports: list[Row]


def transports(config: TransportsConfig) -> str:
    """The whole screen, or its JSON. SetupError: no room for two pools."""
    block_bytes = config.block_kib << 10
    num_blocks = (config.mib << 20) // block_bytes
    try:
        with tempfile.TemporaryDirectory(prefix="slipstream-doctor-", dir=config.shm_dir) as folder:
            memcpy, rows = measure_all(Path(folder), num_blocks, block_bytes, REPEATS)
    except OSError as error:
        line = f"slipstream doctor: --shm-dir {config.shm_dir}: {error.strerror}"
        raise SetupError(line) from None
    report = Report(memcpy, compiled() is not None, rows)
    if config.json:
        return msgspec.json.encode(report).decode()
    return _screen(report, num_blocks, config.block_kib)


def _screen(report: Report, num_blocks: int, block_kib: int) -> str:
    one_pass = "one pass" if report.compiled else "two passes: no C++ compiler (SLOW)"
    lines = [
        f"Two processes of this machine, {num_blocks} blocks of {block_kib} KiB; GB/s and share of "
        f"memcpy ({report.memcpy:.1f} GB/s)",
        f"Copy and digest in {one_pass}",
        "",
        f"{'transport':<11}{'verified':<15}{'bare':<15}leads to",
    ]
    working = [row for row in report.transports if not row.reason]
    rates = {row.name: row.verified for row in working}
    taken = best_of(rates) if rates else ""
    for row in report.transports:
        if row.reason:
            lines.append(f"{row.name:<11}no: {row.reason}")
            continue
        measured = "".join(
            f"{f'{rate:.1f} ({rate / report.memcpy:.0%})':<15}" for rate in (row.verified, row.bare)
        )
        note = ""
        if row.name == taken:
            note = "  <- taken here"
        elif row.verified > rates[taken]:
            note = f"  not {CLEARLY:g} times as fast as {taken}"
        lines.append(f"{row.name:<11}{measured}{_FOR[row.name]}{note}")
    lines += [
        "",
        "Workers measure their peers in the same way and take the first, unless a later one is "
        f"more than {CLEARLY:g} times as fast.",
    ]
    return "\n".join(lines)
