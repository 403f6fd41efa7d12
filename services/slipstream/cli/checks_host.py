"""What the machine gives: cores, memory, shared memory, huge pages, files, clock, GPUs."""

import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from slipstream.cli.checks_software import numbers
from slipstream.cli.checkup import Check, fail, ok, warn
from slipstream.cli.model_error import ModelError
from slipstream.cli.models import DEMO, DEMO_NAME, HUB_ID, demo_file, models_dir
from slipstream.config import format_bytes
from slipstream.engine.quantized_config import read_quantization
from slipstream.kv.cuda_driver import CudaDriver, CudaError
from slipstream.runtime.memory import available_memory

_GROUP = Path("/sys/fs/cgroup")
_SHM_LEAST = 64 << 20
"""Docker's default for /dev/shm, which is too little for two pools."""
_FILES_LEAST, _FILES_ENOUGH = 256, 4096
_PROCESS_BYTES = 512 << 20
"""Python, torch and buffers of a worker, and its share of the control plane."""
_COLLAPSE = (6, 1)
"""Linux, from which on /dev/shm gives huge pages."""
_UNSYNCHRONISED = 0x40
_COMMAND_TIMEOUT_S = 10.0


def cores(group: Path = _GROUP) -> Check:
    there, ours = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    found = f"{ours} of {there}" if ours != there else f"{there}"
    quota = _cpu_quota(group)
    if quota is not None and quota < ours:
        threads = max(1, int(quota))
        return warn(
            "cores",
            f"{found}, of which the control group allows {quota:g}",
            f"--threads {threads}, or more threads than that wait for each other",
        )
    if ours < 2:
        return warn("cores", found, "a worker and the rest of the stack share it; give two or more")
    return ok("cores", found)


def _cpu_quota(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None


def memory(model: str, environ: Mapping[str, str]) -> Check:
    """Weights are in memory once for all workers of a host."""
    free = available_memory()
    found = f"{format_bytes(free)} free"
    try:
        weights = weight_bytes(model, environ)
    except (ModelError, OSError) as error:
        return warn("memory", f"{found}; {error}", "give a MODEL: slipstream doctor MODEL")
    if weights is None:
        return ok("memory", f"{found}; {model} is not here, so its size is not known")
    need = weights + 2 * _PROCESS_BYTES
    found += f", {model} has {format_bytes(weights)} of weights"
    if free < weights:
        return fail("memory", found, "take a smaller model, or --quantization int8")
    if free < need:
        out = f"{format_bytes(need)} leave room for KV blocks; --prefill 0 needs less"
        return warn("memory", found, out)
    return ok("memory", found)


def _growth(folder: Path) -> int:
    """How many times as large as its files the weights are in memory."""
    try:
        found = read_quantization(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError):  # the worker will say what is wrong
        return 1
    return 1 if found is None else found.growth


def weight_bytes(model: str, environ: Mapping[str, str]) -> int | None:
    """None: a hub id, whose files are elsewhere. ModelError, OSError: there is no such model."""
    path = Path(model).expanduser()
    if model == DEMO:
        path = models_dir(environ) / DEMO_NAME
        path = path if path.is_dir() else demo_file()
    if path.is_dir():
        return _growth(path) * sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if path.is_file():
        return 4 * path.stat().st_size  # at 4 to 5 bits in the file, 16 in memory
    if HUB_ID.fullmatch(model):
        return None
    raise ModelError(f"{model}: no such folder or file")


def shared_memory(folder: str) -> Check:
    name = "shared memory"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return fail(name, f"{folder}: {error.strerror}", "--shm-dir FOLDER on a tmpfs")
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail(name, f"{folder} cannot be written", "--shm-dir FOLDER on a tmpfs")
    found = f"{folder}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if usage.free <= _SHM_LEAST:
        return warn(name, found, "KV pools lie there; docker run --shm-size 2g, or --shm-dir")
    return ok(name, found)


def huge_pages(
    kernel: str = os.uname().release, folder: Path = Path("/sys/kernel/mm/transparent_hugepage")
) -> Check:
    name = "huge pages"
    try:
        text = (folder / "enabled").read_text(encoding="ascii")
    except OSError:
        return warn(name, "this kernel has none", "transfers between workers are slower without")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        return warn(name, "transparent ones are off", f"echo madvise > {folder}/enabled")
    if numbers(kernel)[:2] < _COLLAPSE:
        return warn(name, f"Linux {kernel} has none for /dev/shm", "Linux 6.1 or newer does")
    return ok(name, f"{chosen}, Linux {kernel}")


def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    found = "without limit" if soft == infinite else str(soft)
    if soft != infinite and soft < _FILES_ENOUGH:
        most = "" if hard == infinite else f" (at most {hard} without root)"
        make = fail if soft < _FILES_LEAST else warn
        return make("open files", found, f"each stream needs one: ulimit -n 65536{most}")
    return ok("open files", found)


class _Timex(ctypes.Structure):
    """struct timex of <sys/timex.h>, as far as it is read."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 512),
    )


def clock() -> Check:
    state = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state)) < 0:
        return warn("clock", "cannot be asked", "see that all hosts have the same time")
    if state.status & _UNSYNCHRONISED:
        return warn(
            "clock",
            "not synchronised",
            "timedatectl set-ntp true, or log lines of several hosts do not fit together",
        )
    return ok("clock", f"synchronised, {state.maxerror / 1e3:.0f} ms at most")


def gpu() -> Iterator[Check]:
    if not Path("/proc/driver/nvidia/version").exists():
        yield ok("gpu", "none with an NVIDIA driver; workers compute on the CPU")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            query, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        yield warn("gpu", f"nvidia-smi: {error}", "see that the driver is loaded")
        return
    yield ok("gpu", "; ".join(said.splitlines()))
    yield torch_cuda()
    yield _cuda_ipc()


def torch_cuda(folders: Sequence[str] | None = None) -> Check:
    """By what torch's package says of itself: importing it takes seconds. `folders`: of it."""
    name, way_out = "torch with cuda", "workers compute on the CPU: install torch built for CUDA"
    if folders is None:
        spec = find_spec("torch")
        folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        with suppress(OSError):
            text = Path(folder, "version.py").read_text(encoding="utf-8")
            if (built := re.search(r"^cuda[^=]*= *'([^']+)'", text, re.M)) is not None:
                return ok(name, f"CUDA {built[1]}")
    return warn(name, "it has none" if folders else "torch is not installed", way_out)


def _cuda_ipc() -> Check:
    name = "cuda ipc"
    try:
        driver = CudaDriver()
        driver.export(driver.allocate(b"slipstream"))
    except CudaError as error:
        return warn(name, str(error), "GPUs of this host exchange blocks by way of the host")
    return ok(name, "memory can be shared between processes")
