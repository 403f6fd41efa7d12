"""Streams under a grammar through a worker's machine: planned ahead, drafted, preempted, moved."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from llguidance import LLMatcher
from transformers import PreTrainedModel

from core.builders import decode, node_info, worker_info
from engine.test_runner import runner_for
from engine.tiny import WORDS, WORDS_VOCAB, generate, prompt_of
from slipstream.core.machine import BatchDone, BatchPlan, Event, Received, RunBatch, Send, Started
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_settings import WorkerSettings
from slipstream.engine.runner import Runner
from slipstream.messages import SCHEDULER, Finished, TokensOut
from slipstream.types import SamplingParams, unpack_tokens

Saved = Callable[[str], tuple[Path, PreTrainedModel]]
EOS = 2
GRAMMAR = LLMatcher.grammar_from_regex(r"([a-d]{1,4}(, |\. )){8,20}")
BLOCKS = 10


class Worker:
    """A machine, and a runner that ends its steps one after another."""

    def __init__(self, folder: Path, steps_in_flight: int, draft_tokens: int) -> None:
        info = worker_info(num_blocks=BLOCKS, vocab_size=WORDS_VOCAB, max_model_len=16 * BLOCKS)
        settings = WorkerSettings(
            eos_token_ids=(EOS,), steps_in_flight=steps_in_flight, draft_tokens=draft_tokens
        )
        self.machine = WorkerMachine(node_info(worker=info), settings)
        self.runner: Runner = runner_for(folder, blocks=BLOCKS)
        self.plans: deque[BatchPlan] = deque()
        self.said: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.handle(Started())

    def handle(self, event: Event) -> None:
        for effect in self.machine.handle(event, 0.0):
            match effect:
                case RunBatch(plan):
                    self.plans.append(plan)
                case Send(_, TokensOut(spans=spans)):
                    for span in spans:
                        tokens = self.said.setdefault(span.request_id, [])
                        tokens[span.position :] = unpack_tokens(span.tokens)
                case Send(_, Finished(request_id=request_id)):
                    self.finished.add(request_id)

    def step(self) -> None:
        plan = self.plans.popleft()
        self.handle(BatchDone(plan.step, self.runner.run(plan), {}))


def sampling(seed: int) -> dict[str, object]:
    """Of a model that repeats itself, so that drafts are right at times."""
    bias = ((68, 3.0), (69, 3.0))
    changes = {"grammar": GRAMMAR, "bad_tokens": ((69, 69),), "min_tokens": 30, "logit_bias": bias}
    return {"max_tokens": 90, "seed": seed, "temperature": 0.7, "logprobs": 0, **changes}


@pytest.mark.parametrize("moved_after", [0, 1, 7, 33])
@pytest.mark.parametrize("draft_tokens", [0, 4])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_stream_is_the_same_in_whatever_steps(
    saved: Saved, steps_in_flight: int, draft_tokens: int, moved_after: int
) -> None:
    folder, _ = saved(WORDS)
    alone, worker = runner_for(folder), Worker(folder, steps_in_flight, draft_tokens)
    prompts = {f"r{seed}": prompt_of(20, seed) for seed in range(4)}
    wanted: dict[str, list[int]] = {}
    for seed, (name, prompt) in enumerate(prompts.items()):
        made = generate(alone, prompt, SamplingParams(**sampling(seed)), 90)  # type: ignore[arg-type]
        wanted[name] = list(made[: made.index(EOS) + 1] if EOS in made else made)
        accepted = wanted[name][:moved_after]
        worker.said[name] = [*accepted]
        message = decode(name, prompt, accepted=accepted, **sampling(seed))
        worker.handle(Received(SCHEDULER, message))
    while worker.plans:
        worker.step()
    assert worker.said == wanted and worker.finished == set(prompts)
    assert len({len(tokens) for tokens in wanted.values()}) > 1, "they end at different times"
    counters = worker.machine.batcher
    assert counters.preemptions > 0, "blocks were short"
