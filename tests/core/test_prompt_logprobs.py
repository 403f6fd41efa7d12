"""Log probabilities of a prompt: all of it is computed, once, and whoever says token 0 has them."""

import pytest

from core.builders import decode
from core.workers import PROMPT, Worker, handed_over, relay
from sim.device import prompt_scores
from slipstream.messages import Release, Released, Resend

SCORES = prompt_scores(PROMPT)


def test_a_cached_prompt_is_computed_anew_and_fills_the_cache_as_any_other() -> None:
    worker = Worker(prefill_budget_tokens=16)
    worker.hear(decode("first", PROMPT, max_tokens=2))
    worker.run()
    worker.said.clear()
    worker.hear(decode("r", PROMPT, max_tokens=2, prompt_logprobs=0))
    assert worker.plans[0].rows[0].start == 0
    worker.run()
    assert worker.said[0].prompt_logprobs == SCORES and worker.said[0].cached_tokens == 0
    assert all(span.prompt_logprobs is None for span in worker.said[1:])


def test_a_stream_that_goes_on_needs_none() -> None:
    worker = Worker()
    worker.hear(decode("first", PROMPT, max_tokens=2))
    worker.run()
    worker.said.clear()
    worker.hear(decode("r", PROMPT, accepted=[5], max_tokens=3, prompt_logprobs=0))
    assert worker.plans[0].rows[0].start > 0 and not worker.plans[0].rows[0].prompt_logprobs
    worker.run()
    assert all(span.prompt_logprobs is None for span in worker.said)


def test_who_takes_the_stream_over_can_say_them_again() -> None:
    source = Worker("prefill-0", accept_decode=False, prefill_budget_tokens=16)
    target = Worker(prefill_budget_tokens=0)
    handed_over(source, target, prompt_logprobs=0, max_tokens=4)
    assert source.said[0].prompt_logprobs == SCORES
    target.read(source)
    relay(target, source, Release)
    relay(source, target, Released)
    target.run()
    target.hear(Resend(request_id="r", attempt=1, position=0), source="tokenizer-0")
    assert target.said[-1].position == 0 and target.said[-1].prompt_logprobs == SCORES


def test_a_preempted_job_begins_anew_with_them() -> None:
    """Two streams in a pool that holds one: the younger is computed again, from the beginning."""
    worker = Worker(num_blocks=5, prefill_budget_tokens=16)
    worker.hear(decode("old", PROMPT[:30], max_tokens=40, ignore_eos=True))
    worker.step()
    worker.hear(decode("young", PROMPT[::-1], max_tokens=3, ignore_eos=True, prompt_logprobs=0))
    worker.run()
    assert worker.machine.batcher.preemptions
    (first,) = [s for s in worker.said if s.request_id == "young" and s.position == 0][:1]
    assert first.prompt_logprobs == prompt_scores(PROMPT[::-1])


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33])
def test_every_length(length: int) -> None:
    worker = Worker(prefill_budget_tokens=16)
    worker.hear(decode(prompt=PROMPT[:length], max_tokens=1, prompt_logprobs=0))
    worker.run()
    assert worker.said[0].prompt_logprobs == prompt_scores(PROMPT[:length])
