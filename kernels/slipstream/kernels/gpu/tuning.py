"""How kernels are launched on which card: measured once, kept in files, chosen by nearest shape.

`configs/<card>.json` is what `python -m slipstream.kernels tune` writes on that card:
`{kernel: [{"shape": {...}, "launch": {...}}, ...]}`. A card without a file is launched as `USUAL`
says; nothing is ever tried out at a start.
"""

import functools
import json
import math
from pathlib import Path
from typing import TypeAlias

import torch

FOLDER = Path(__file__).with_name("configs")
Launch: TypeAlias = dict[str, int]
"""Of one kernel: its sizes of tiles, `num_warps`, `num_stages`."""
Entries: TypeAlias = dict[str, list[dict[str, Launch]]]

USUAL: dict[str, list[Launch]] = {
    "splits": [
        {"N": 64, "LEAST": 128, "PROGRAMS": 8, "num_warps": 4, "num_stages": 5},
        {"N": 32, "LEAST": 128, "PROGRAMS": 8, "num_warps": 4, "num_stages": 7},
        {"N": 64, "LEAST": 128, "PROGRAMS": 8, "num_warps": 4, "num_stages": 7},
        {"N": 64, "LEAST": 128, "PROGRAMS": 4, "num_warps": 4, "num_stages": 5},
        {"N": 128, "LEAST": 256, "PROGRAMS": 4, "num_warps": 8, "num_stages": 5},
        {"N": 64, "LEAST": 128, "PROGRAMS": 16, "num_warps": 4, "num_stages": 3},
    ],
    "chunks": [
        {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3},
        {"M": 128, "N": 64, "num_warps": 8, "num_stages": 5},
        {"M": 128, "N": 128, "num_warps": 8, "num_stages": 3},
        {"M": 128, "N": 64, "num_warps": 4, "num_stages": 3},
        {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3},
    ],
}
"""Of each kernel what is worth a try; the first is taken where nothing was measured.

Stages are of the loop over keys. The ids of blocks are loaded a stage ahead of what lies in them,
so of S stages (S - 1) / 2 tiles are on their way: with three nothing is while one is computed.
"""

INTERPRETED: dict[str, Launch] = {
    "splits": {"N": 64, "LEAST": 64, "PROGRAMS": 8, "num_warps": 4, "num_stages": 1},
    "chunks": {"M": 128, "N": 64, "num_warps": 4, "num_stages": 1},
}
"""Contexts that tests can afford are split too."""
FLOAT32: dict[str, Launch] = {
    "splits": {"N": 32, "LEAST": 128, "PROGRAMS": 4, "num_warps": 4, "num_stages": 1},
    "chunks": {"M": 16, "N": 32, "num_warps": 4, "num_stages": 1},
}
"""Products without matrix units hold operands in registers. It is for exactness, not speed."""


class Tuning:
    """Launches for one card. `processors`: its multiprocessors."""

    def __init__(
        self, entries: Entries, processors: int, always: dict[str, Launch] | None = None
    ) -> None:
        """`always`: whatever the shape."""
        self.processors = processors
        self._entries, self._always = entries, always

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Tuning":
        """ValueError: the card's file is not what `tune` writes."""
        if device.type != "cuda":
            return cls({}, 1, INTERPRETED)
        properties = torch.cuda.get_device_properties(device)
        always = FLOAT32 if dtype == torch.float32 else None
        return cls(read(properties.name), properties.multi_processor_count, always)

    @classmethod
    def fixed(cls, kernel: str, launch: Launch, processors: int) -> "Tuning":
        """This launch for `kernel`; for measurements."""
        return cls(
            {}, processors, {**{name: each[0] for name, each in USUAL.items()}, kernel: launch}
        )

    def choose(self, kernel: str, **shape: int) -> Launch:
        """A copy of the launch whose shape is nearest, by factors."""
        if self._always is not None:
            return dict(self._always[kernel])
        entries = self._entries.get(kernel)
        if not entries:
            return dict(USUAL[kernel][0])
        return dict(min(entries, key=lambda entry: _distance(entry["shape"], shape))["launch"])


def _distance(one: Launch, other: Launch) -> float:
    return sum(abs(math.log2(one[name] / other[name])) for name in one.keys() & other.keys())


def file_of(card: str, folder: Path = FOLDER) -> Path:
    """`NVIDIA H200` -> `NVIDIA_H200.json`"""
    return folder / f"{''.join(c if c.isalnum() or c in '-.' else '_' for c in card)}.json"


@functools.cache
def read(card: str, folder: Path = FOLDER) -> Entries:
    """What was measured; nothing if there is no file. ValueError: it is not what `tune` writes."""
    path = file_of(card, folder)
    if not path.exists():
        return {}
    entries: Entries = json.loads(path.read_text(encoding="utf-8"))
    for kernel, measured in entries.items():
        wanted = USUAL.get(kernel, [{}])[0].keys()
        for entry in measured:
            if not wanted or entry["launch"].keys() != wanted or min(entry["shape"].values()) < 1:
                raise ValueError(f"{path}: {kernel}: {entry}; `tune` writes it anew")
    return entries


def write(card: str, entries: Entries, folder: Path = FOLDER) -> Path:
    """OSError: the folder cannot be written."""
    path = file_of(card, folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return path
