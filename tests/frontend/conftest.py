from collections.abc import AsyncIterator

import pytest

from frontend.fakes import FakeGateway, Server, serving
from slipstream.frontend.app import AppSettings
from slipstream.frontend.validate import Limits


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    settings = AppSettings(limits=Limits(max_body_bytes=100_000), keep_alive_s=5.0)
    async with serving(FakeGateway(), settings) as running:
        yield running
