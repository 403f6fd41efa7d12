from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from e2e.client import Client
from e2e.reference import Reference
from e2e.stack import Stack, ports_in_a_row


@pytest.fixture(scope="session")
def reference(pytestconfig: pytest.Config) -> Reference:
    """What Transformers answers. Before the first stack, so that each has the machine to itself."""
    return Reference.made(pytestconfig)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The default stack: one of each, every prompt handed over, with metrics on the ports behind
    its own. For tests that leave it whole."""
    port = ports_in_a_row(7)
    stack = Stack(kv_cache_bytes="1GiB", transports="shm", port=port, metrics_port=port + 1)
    yield stack
    stack.close()


@pytest.fixture(scope="session")
def twin() -> Iterator[Stack]:
    """Two prefill workers with small steps. Tests may kill parts of it and wait until it is whole
    again. The index may be slow: on a machine that is busy with other tests it is."""
    stack = Stack(prefill=2, prefill_budget_tokens=128, locate_timeout_s=5.0)
    yield stack
    stack.close()


@pytest_asyncio.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with Client(stack.url) as client:
        yield client


@pytest_asyncio.fixture
async def twin_client(twin: Stack) -> AsyncIterator[Client]:
    async with Client(twin.url) as client:
        yield client
