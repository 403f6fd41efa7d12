"""Phases that end in each way, for `test_gpu`."""

import time
from collections.abc import Callable
from pathlib import Path

from slipstream.loadtest.gpu.results import Row, rate_row


def good(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    tell(rate_row("speed", 70.0, "GB/s", 100.0, 0.8))
    tell(Row("files", len(list(folder.iterdir())), ""))


def uses(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    tell(Row("told", floors["speed"], "GB/s"))


def broken(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    tell(Row("before", 1.0, ""))
    raise RuntimeError("an illegal address")


def hangs(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    tell(Row("before", 1.0, ""))
    time.sleep(600)
