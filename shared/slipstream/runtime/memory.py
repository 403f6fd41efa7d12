"""What memory is left on this host, and whether what is asked for fits."""

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


def require_host_tier(
    who: str, host_bytes: int, pool_bytes: int, memory_free: int, workers: int = 1
) -> None:
    """StartError: memory for the tier below the pool is not there beside the pool. `host_bytes`,
    `pool_bytes`: of each worker."""
    left = max(0, memory_free - workers * pool_bytes)
    if host_bytes and workers * host_bytes > left:
        each = f" for each of {workers} workers" if workers > 1 else ""
        beside = f" beside KV pools of {format_bytes(pool_bytes)}" if pool_bytes else ""
        raise StartError(
            f"{who}: --offload-host-bytes {format_bytes(host_bytes)}{each} is too much: of "
            f"{format_bytes(memory_free)} free memory {format_bytes(left)} are left{beside}; lower "
            f"it{' or --kv-cache-bytes' if pool_bytes else ''}",
            ExitCode.MEMORY,
        )
