"""Requests drawn from our own OpenAPI document: nothing breaks, and the document is true."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.environments import HERE, TOOLS, lacks_python, run
from e2e.client import Client
from e2e.stack import Stack

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
EXAMPLES, SEED = 10, 1
"""Drawn ones of each path; beside them are some thousands that go through every member's limits."""
TIMEOUT_S = 500.0


@pytest.fixture
def small() -> Iterator[Stack]:
    """With a short context, so that no answer is long."""
    stack = Stack(max_model_len=64, kv_cache_bytes="96MiB", disaggregation="auto")
    yield stack
    stack.close()


@pytest.mark.skipif(bool(lacks_python()), reason=lacks_python())
async def test_schemathesis(small: Stack, tmp_path: Path) -> None:
    config = HERE / "programs" / "schemathesis.toml"
    words = [
        *(str(TOOLS.with_name("schemathesis")), "--config-file", str(config)),
        *("run", f"{small.url}/openapi.json", "--checks", ",".join(CHECKS)),
        *("--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", str(SEED)),
        *("--continue-on-failure", "--warnings", "off", "--request-timeout", "60"),
    ]
    said = await asyncio.to_thread(run, words, tmp_path, TIMEOUT_S)
    (generated,) = re.findall(r"(\d[\d,]*) generated", said)
    assert int(generated.replace(",", "")) > 2000, said[-2000:]
    async with Client(small.url) as client:
        assert (await client.complete("Still there?", max_tokens=1)).finish_reason == "length"
    await asyncio.to_thread(small.until_settled)
    assert "Traceback" not in small.log
