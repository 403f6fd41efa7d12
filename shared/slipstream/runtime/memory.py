"""What memory is left on this host, and whether what is asked for fits."""

from collections.abc import Sequence
from pathlib import Path

from slipstream.config import StartError, format_bytes
from slipstream.errors import ExitCode


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new allocations can have: the host's, or what the control group leaves of them.
    Both count as free what files have in memory, for the kernel gives that up."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }
    available = sizes["MemAvailable"]
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such file, or "max"
        return available
    parts = dict(line.split() for line in stat)
    files = int(parts["active_file"]) + int(parts["inactive_file"])
    return max(0, min(available, limit - used + files))


def require_pools(who: str, pools: Sequence[int], free: int, place: str) -> None:
    """StartError: KV pools of so many bytes, one of each worker, do not fit into what is free."""
    if sum(pools) > free:
        raise StartError(
            f"{who}: --kv-cache-bytes {_sum(pools)} is too much: {format_bytes(free)} are free in "
            f"{place}; lower it",
            ExitCode.MEMORY,
        )


def require_host_tiers(
    who: str, tiers: Sequence[int], pools: Sequence[int], memory_free: int
) -> None:
    """StartError: memory for the tiers below the pools is not there beside the pools. Bytes, of
    each worker; 0: none asked for."""
    left = max(0, memory_free - sum(pools))
    if any(tiers) and sum(tiers) > left:
        beside = f" beside KV pools of {_sum(pools)}" if any(pools) else ""
        raise StartError(
            f"{who}: --offload-host-bytes {_sum(tiers)} is too much: of "
            f"{format_bytes(memory_free)} free memory {format_bytes(left)} are left{beside}; lower "
            f"it{' or --kv-cache-bytes' if any(pools) else ''}",
            ExitCode.MEMORY,
        )


def _sum(sizes: Sequence[int]) -> str:
    workers = f" for {len(sizes)} workers together" if len(sizes) > 1 else ""
    return format_bytes(sum(sizes)) + workers
