"""What was measured, on what machine and how; written after each measurement."""

import datetime
import os
import shlex
import sys
from pathlib import Path

import msgspec
import psutil

from slipstream.loadtest.versus.server import Launch

START = "start"
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")


class Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int
    flags: list[str]
    memory_bytes: int


class Measurement(msgspec.Struct, frozen=True):
    round: int
    peer: str
    load: str
    """A load's name, or `start`."""
    numbers: dict[str, float] = {}
    failure: str = ""
    """Why there are no numbers."""


class Results(msgspec.Struct, kw_only=True):
    command: str
    date: str
    machine: Machine
    seed: int
    requests: int
    """Of each closed loop; 0: as each load has it."""
    versions: dict[str, str] = {}
    commands: dict[str, list[str]] = {}
    """Peer -> its programs, as started last."""
    missing: dict[str, str] = {}
    """Peer -> why it could not be installed or started."""
    quality: dict[str, float] = {}
    """Of int8 weights: `loadtest.quality`."""
    measurements: list[Measurement] = []

    def add(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)

    def has(self, round_: int, peer: str, load: str) -> bool:
        return any(
            (one.round, one.peer, one.load) == (round_, peer, load) for one in self.measurements
        )

    def drop_failures(self) -> None:
        """So that they are tried anew."""
        self.missing.clear()
        self.measurements = [one for one in self.measurements if not one.failure]

    def value(self, round_: int, peer: str, load: str, number: str) -> float | None:
        for one in self.measurements:
            if (one.round, one.peer, one.load) == (round_, peer, load) and not one.failure:
                return one.numbers.get(number)
        return None

    @property
    def rounds(self) -> list[int]:
        return sorted({one.round for one in self.measurements})


def load(path: Path) -> Results:
    """OSError, msgspec.DecodeError: there is none that can be read."""
    return msgspec.json.decode(path.read_bytes(), type=Results)


def save(results: Results, path: Path) -> None:
    """Whole or not at all."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(text + b"\n")
    temporary.replace(path)


def this_machine() -> Machine:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Machine(
        cpu=fields.get("model name", "unknown"),
        cores=len(os.sched_getaffinity(0)),
        flags=[flag for flag in _TELLING_FLAGS if flag in flags],
        memory_bytes=int(psutil.virtual_memory().total),
    )


def today() -> str:
    return datetime.date.today().isoformat()


def shown(launch: Launch, peers_dir: Path) -> list[str]:
    """The command lines, without what is one machine's own."""
    own = {
        str(peers_dir): "PEERS",
        sys.executable: "python",
        sys.prefix: ".venv",
        str(Path.home()): "~",
    }
    lines = []
    for program in launch.programs:
        line = " ".join(shlex.quote(word) for word in program.command)
        for path, name in own.items():
            line = line.replace(path, name)
        lines.append(line)
    return lines
