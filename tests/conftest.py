"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-wire-schema",
        action="store_true",
        help="write down today's messages, after a look at what has changed",
    )
