"""A worker whose step hangs ends; one whose step is long does not."""

import pytest

from core.builders import decode
from core.workers import PROMPT, Worker
from slipstream.core.step_watch import MANY_TOKENS, TIMES_SLOWEST, UNMEASURED_S
from slipstream.messages import Drop

TIMEOUT_S = 10.0
CHUNK = 256


@pytest.fixture
def worker() -> Worker:
    """Has measured a step of many tokens and one that decodes, at 0.1 s for each."""
    worker = Worker(max_model_len=4096, num_blocks=1024, prefill_budget_tokens=CHUNK)
    worker.step_s = 0.1
    worker.hear(decode(prompt=[7] * MANY_TOKENS, max_tokens=2, ignore_eos=True))
    worker.run()
    return worker


def hangs(worker: Worker) -> float:
    """How long until it ends itself."""
    began_s = worker.now_s
    worker.pass_time(1000.0)
    assert worker.exits
    return worker.now_s - began_s


def test_a_step_that_hangs_ends_the_worker_after_ten_seconds(worker: Worker) -> None:
    worker.hear(decode("next", prompt=PROMPT, max_tokens=9, ignore_eos=True))
    worker.step()
    assert TIMEOUT_S < hangs(worker) <= TIMEOUT_S + TIMES_SLOWEST * worker.step_s


def test_a_step_with_more_tokens_may_take_longer(worker: Worker) -> None:
    worker.hear(decode("long", prompt=[9] * CHUNK, max_tokens=9))
    longest_s = TIMES_SLOWEST * worker.step_s * CHUNK / MANY_TOKENS
    assert hangs(worker) == pytest.approx(TIMEOUT_S + longest_s)


def test_the_first_step_of_its_kind_may_take_long() -> None:
    worker = Worker()
    worker.hear(decode(prompt=PROMPT, max_tokens=2))
    assert hangs(worker) == UNMEASURED_S


def test_who_has_nothing_to_do_is_not_hung(worker: Worker) -> None:
    worker.hear(decode("next", prompt=PROMPT, max_tokens=9, ignore_eos=True))
    worker.hear(Drop(request_id="next", attempt=1))
    worker.step()
    worker.pass_time(10 * TIMEOUT_S)
    assert not worker.exits and not worker.plans
