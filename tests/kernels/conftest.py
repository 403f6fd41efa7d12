import ctypes

import pytest

from slipstream.kernels import cpu
from slipstream.kernels.build import LEVELS, VARIABLE, cpu_features, default_cache_dir


@pytest.fixture(scope="session", params=[level.name for level in LEVELS])
def compiled(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """For each kind of CPU that this one can stand for."""
    if cpu.kernels() is None:
        pytest.skip("no C++ compiler here, or no kernels wanted")
    level = next(level for level in LEVELS if level.name == request.param)
    if missing := level.features - cpu_features():
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, request.param)
        return cpu.load(default_cache_dir())
