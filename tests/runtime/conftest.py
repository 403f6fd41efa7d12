import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cluster import Cluster


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Like tmp_path, but short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def cluster(short_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(short_path)
    yield cluster
    cluster.close()


@pytest.fixture(params=["ipc", "tcp"])
def any_cluster(short_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster = Cluster(short_path, request.param)
    yield cluster
    cluster.close()
