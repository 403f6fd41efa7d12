"""`slipstream doctor`: whether this machine can run it, and what to do where it cannot."""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum

import msgspec

from slipstream.cli.commands import DoctorConfig


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


class Check(msgspec.Struct, frozen=True):
    name: str
    state: State
    found: str
    way_out: str = ""
    """What to do about it."""


def ok(name: str, found: str) -> Check:
    return Check(name, State.OK, found)


def warn(name: str, found: str, way_out: str) -> Check:
    """It runs, but not as well as it could."""
    return Check(name, State.WARN, found, way_out)


def fail(name: str, found: str, way_out: str) -> Check:
    return Check(name, State.FAIL, found, way_out)


def checks(config: DoctorConfig, environ: Mapping[str, str]) -> Iterator[Check]:
    """In the order in which they are shown."""
    from slipstream.cli import checks_around, checks_host, checks_software

    yield from checks_software.packages()
    yield checks_software.kernels()
    yield checks_host.cores()
    yield checks_host.memory(config.model, environ)
    yield checks_host.shared_memory(config.shm_dir)
    yield checks_host.huge_pages()
    yield checks_host.open_files()
    yield checks_host.clock()
    yield from checks_host.gpu()
    yield checks_software.nixl()
    yield checks_around.port(config.host, config.port)
    yield checks_around.redis(config.redis_url, environ)
    yield from checks_around.keys(config.keys_dir)
    yield checks_around.containers(environ)


def screen(found: Sequence[Check]) -> str:
    width = max(len(check.name) for check in found) + 2
    lines = []
    for check in found:
        way_out = f" -> {check.way_out}" if check.way_out else ""
        lines.append(f"{check.state:<6}{check.name:<{width}}{check.found}{way_out}")
    counts = {state: sum(check.state is state for check in found) for state in State}
    lines += ["", ", ".join(f"{count} {state}" for state, count in counts.items())]
    return "\n".join(lines)
