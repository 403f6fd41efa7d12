"""What is installed: Python, packages, a compiler for the kernels, NIXL."""

import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import TypeAlias

from slipstream.cli.checkup import Check, fail, ok, warn
from slipstream.kernels.build import BuildError, chosen_level
from slipstream.kernels.verified_copy import compiled

_CONTROL = ("pyzmq", "msgspec", "aiohttp", "tokenizers", "redis", "numpy")
_WORKER = ("torch", "transformers", "safetensors")
_NIXL = ("nixl-cu12", "nixl-cu13")
_PYTHON = (3, 11)
_Make: TypeAlias = Callable[[str, str, str], Check]
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)[^>;]*>=\s*([0-9.]+)")


def packages() -> Iterator[Check]:
    version = platform.python_version()
    if sys.version_info >= _PYTHON:
        yield ok("python", version)
    else:
        yield fail("python", version, "Python 3.11 or newer is needed")
    oldest = _oldest()
    for name in _CONTROL:
        yield _package(name, oldest, "pip install slipstream", fail)
    for name in _WORKER:
        yield _package(name, oldest, "workers need it: pip install 'slipstream[worker]'", warn)


def _oldest() -> Mapping[str, str]:
    """Package -> the oldest version that will do, as our own metadata say."""
    try:
        wanted = metadata.requires("slipstream") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    found = (_REQUIREMENT.match(one) for one in wanted)
    return {match[1].lower(): match[2] for match in found if match is not None}


def _package(name: str, oldest: Mapping[str, str], way_out: str, make: _Make) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return make(name, "not installed", way_out)
    least = oldest.get(name, "0")
    if numbers(version) < numbers(least):
        return make(name, f"{version} is older than {least}", f"pip install -U '{name}>={least}'")
    return ok(name, version)


def numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)"""
    leading = re.split(r"[^0-9.]", version, maxsplit=1)[0]
    return tuple(int(part) for part in leading.split(".") if part)


def kernels() -> Check:
    """Compiles them if nobody has, which takes some seconds."""
    name = "kernels"
    try:
        level = chosen_level()
    except BuildError as error:
        return fail(name, str(error), "unset SLIPSTREAM_CPU_KERNELS")
    if compiled() is None:
        there = shutil.which("g++") or shutil.which("c++")
        way_out = "see the worker's log" if there else "apt-get install g++"
        return warn(name, f"not compiled for {level.name}, so everything is SLOW", way_out)
    if not level.features:
        return warn(name, "compiled, without vectors", "a CPU with AVX2 or AVX-512 is faster")
    return ok(name, f"compiled for {level.name}")


def nixl() -> Check:
    for name in _NIXL:
        try:
            return ok("nixl", f"{metadata.version(name)}; slipstream doctor transports measures it")
        except metadata.PackageNotFoundError:
            continue
    return ok("nixl", "not installed; only for RDMA between hosts: pip install 'slipstream[nixl]'")
