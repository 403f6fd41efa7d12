from collections.abc import Iterator

import pytest

from e2e.stack import Stack


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The default stack: one of each, every prompt handed over. For tests that leave it whole."""
    stack = Stack()
    yield stack
    stack.close()
