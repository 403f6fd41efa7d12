import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.fake_server import FakeServer, running


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Like tmp_path, but short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A server that is not ours."""
    with running(FakeServer()) as server:
        yield server
