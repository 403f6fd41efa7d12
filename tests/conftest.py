"""Options of the whole suite."""

import os
from pathlib import Path

import pytest

# Triton asks when it is imported: without a card its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-wire-schema",
        action="store_true",
        help="write down today's messages, after a look at what has changed",
    )
