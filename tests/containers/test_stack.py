"""The compose path, tried for real: built, brought up, scaled and hurt under load, taken down.

In float32, where an answer does not depend on what is computed beside it: each has to be the same
however many containers there are, and whoever of them dies.
"""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from containers.stack import Clients, Stack, missing

pytestmark = pytest.mark.timeout(3600)
PROMPTS = [
    f"{number}. " + "Tell me of the sea and of the ships on it. " * 12 for number in range(6)
]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    stack = Stack(
        f"slipstream-test-{os.getpid()}",
        SLIPSTREAM_TAG="test",
        DISAGGREGATION="always",
        DTYPE="float32",
        KV_CACHE_BYTES="400MiB",
        KV_VOLUME="4g",
        TTFT_TARGET_S="0",
    )
    try:
        stack.compose("build", "--quiet", timeout_s=3000)
        stack.up()
        yield stack
    finally:
        stack.down()
        assert not stack.left()


@pytest.fixture(scope="module")
def answers(stack: Stack) -> dict[str, str]:
    found = {prompt: stack.ask(prompt, stream=False) for prompt in PROMPTS}
    assert len(set(found.values())) > 1 and all(found.values())
    return found


def test_blocks_move_by_shared_memory_between_containers(
    stack: Stack, answers: dict[str, str]
) -> None:
    (decode,) = stack.containers("decode")
    metrics = stack.metrics(decode)
    reads = {
        name: value for name, value in metrics.items() if "transfer_reads_total{" in name and value
    }
    assert len(reads) == 1 and 'transport="shm"' in next(iter(reads)), reads
    assert next(iter(reads.values())) >= len(answers)


def test_scaled_up_and_down_under_load_no_request_fails(
    stack: Stack, answers: dict[str, str]
) -> None:
    with Clients(stack, answers) as clients:
        clients.wait_for(3)
        stack.up(decode=3, prefill=2, frontend=2, tokenizer=2)
        assert len(stack.containers("decode")) == 3
        clients.wait_for(12)
        cluster = stack.get("/cluster")
        roles = [each["role"] for each in cluster["workers"] + cluster["services"]]
        found = {role: roles.count(role) for role in ("decode", "prefill", "frontend", "tokenizer")}
        assert found == {"decode": 3, "prefill": 2, "frontend": 2, "tokenizer": 2}
        stack.up(decode=1, prefill=1, frontend=1, tokenizer=1)
        assert len(stack.containers("decode")) == 1
        clients.wait_for(6)
    assert not clients.failures


@pytest.mark.parametrize("role", ["decode", "prefill", "scheduler", "tokenizer", "redis"])
def test_a_container_that_dies_costs_no_request(
    stack: Stack, answers: dict[str, str], role: str
) -> None:
    with Clients(stack, answers) as clients:
        clients.wait_for(3)
        (container,) = stack.containers(role)
        process = int(stack.docker("inspect", "--format", "{{.State.Pid}}", container))
        os.kill(process, signal.SIGKILL)  # with `docker kill` it would stay down
        clients.wait_for(6)
        restarts = stack.docker("inspect", "--format", "{{.RestartCount}}", container)
        assert int(restarts) >= 1
    assert not clients.failures
    stack.up()


def test_taken_down_in_order_nothing_is_left(stack: Stack, answers: dict[str, str]) -> None:
    began_s = time.monotonic()
    stack.down()
    assert time.monotonic() - began_s < 60, "within the grace of a container"
    assert not stack.left()
