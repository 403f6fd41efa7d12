"""A step is launched before the one before it is read back, as on a GPU: with the same tokens."""

import queue
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.tiny import admission, generate, greedy, prompt_of
from slipstream.core.machine import Admission, BatchDone, BatchFailed, BatchPlan, Event, Row
from slipstream.engine import launched
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.readback import Readback
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.engine.step_loop import Outputs, Step, StepLoop
from slipstream.types import SamplingParams

Saved = Callable[[str], tuple[Path, PreTrainedModel]]
WAIT_S = 30.0
WARM = SamplingParams(max_tokens=99, seed=11, temperature=1.3, top_p=0.95)
PENAL = SamplingParams(max_tokens=99, seed=5, temperature=1.0, repetition_penalty=1.4)
TABLES = {"a": (5, 60, 7, 8, 9, 1, 33), "b": (40, 2, 41, 42, 43), "c": (50, 10, 30)}
PROMPTS = {"a": prompt_of(40, 1), "b": prompt_of(33, 2), "c": prompt_of(16, 3)}


class Late(Readback):
    """On the host when somebody waits for it, or after many looks."""

    looks = 0

    def ready(self) -> bool:
        self.looks += 1
        return self.looks > 2000


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "Readback", Late)


def runner_for(folder: Path) -> Runner:
    layout = ModelConfig.read(folder).kv_layout("float32")
    return Runner(folder, "float32", allocate_pool(layout, 64).fill_(torch.nan), threads=2)


class Told:
    """A runner, and in which order it was told what."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.said = runner, list[str]()

    def waits(self, plan: BatchPlan) -> bool:
        return self._runner.waits(plan)

    def launch(self, plan: BatchPlan) -> Step:
        self.said.append(f"launch {plan.step}")
        step, said = self._runner.launch(plan), self.said

        class Said:
            def ready(self) -> bool:
                return step.ready()

            def finish(self) -> Outputs:
                said.append(f"finish {plan.step}")
                return step.finish()

        return Said()


class Loop:
    def __init__(self, runner: Runner) -> None:
        self.told, self.events = Told(runner), queue.SimpleQueue[Event]()
        self._loop = StepLoop(
            *(self.told, self.events.put),
            lambda plan, outputs, began_s: BatchDone(plan.step, outputs, {}),
            lambda plan, error: BatchFailed(plan.step, str(error)),
        )

    def submit(self, step: int, *rows: Row, admit: tuple[Admission, ...] = ()) -> None:
        self._loop.submit(BatchPlan(step, rows, admit))

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_S)

    def close(self) -> None:
        self._loop.close()


def begin(name: str, sampling: SamplingParams) -> tuple[Row, tuple[Admission, ...]]:
    prompt = PROMPTS[name]
    row = Row(name, 1, prompt, 0, TABLES[name], True)
    return row, (admission(name, prompt, sampling),)


def follow(name: str, position: int) -> Row:
    start = len(PROMPTS[name]) + position - 1
    return Row(name, 1, (), start, TABLES[name], True, position, after_previous=True)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("sampling", [greedy(), WARM], ids=["greedy", "warm"])
def test_tokens_do_not_depend_on_when_they_are_read(saved: Saved, sampling: SamplingParams) -> None:
    """Two requests, a third one that joins, always one step planned behind the one that runs."""
    folder, _ = saved("llama")
    count = 12
    expected = {
        name: generate(runner_for(folder), prompt, sampling, count, request_id=name)
        for name, prompt in PROMPTS.items()
    }
    loop = Loop(runner_for(folder))
    (a, new_a), (b, new_b), (c, new_c) = (begin(name, sampling) for name in "abc")
    loop.submit(1, a, b, admit=new_a + new_b)
    loop.submit(2, follow("b", 1), c, follow("a", 1), admit=new_c)
    made: dict[str, list[int]] = {name: [] for name in PROMPTS}
    for step in range(3, count + 2):
        rows = [follow("a", step - 1), follow("c", step - 2), follow("b", step - 1)]
        loop.submit(step, *(row for row in rows if row.position < count))
        landed = loop.next()
        assert isinstance(landed, BatchDone) and landed.step == step - 2
        for output in landed.outputs:
            made[output.request_id] += output.tokens
    for _ in range(2):
        landed = loop.next()
        assert isinstance(landed, BatchDone)
        for output in landed.outputs:
            made[output.request_id] += output.tokens
    loop.close()
    assert {name: tuple(tokens) for name, tokens in made.items()} == expected
    assert loop.told.said[:5] == ["launch 1", "launch 2", "finish 1", "launch 3", "finish 2"]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    "sampling",
    [PENAL, greedy(logprobs=2), greedy(min_tokens=3), greedy(logit_bias=((7, 3.0),))],
    ids=["penalties", "logprobs", "min_tokens", "bias"],
)
def test_who_draws_by_more_than_logits_makes_its_step_wait(
    saved: Saved, sampling: SamplingParams
) -> None:
    folder, _ = saved("llama")
    expected = generate(runner_for(folder), PROMPTS["a"], sampling, 6)
    plain = generate(runner_for(folder), PROMPTS["b"], WARM, 6)
    loop = Loop(runner_for(folder))
    (a, new_a), (b, new_b) = begin("a", sampling), begin("b", WARM)
    loop.submit(1, b, admit=new_b)
    loop.submit(2, follow("b", 1), a, admit=new_a)
    loop.submit(3, follow("b", 2), follow("a", 1))
    for position in range(2, 6):
        both = follow("a", position), follow("b", position + 1)
        loop.submit(position + 2, *both[: 2 if position < 5 else 1])
    made: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(7):
        landed = loop.next()
        assert isinstance(landed, BatchDone), landed
        for output in landed.outputs:
            made[output.request_id] += output.tokens
    loop.close()
    assert (tuple(made["a"]), tuple(made["b"])) == (expected, plain)
    order = [word for step in range(1, 8) for word in (f"launch {step}", f"finish {step}")]
    assert loop.told.said == order


@pytest.mark.usefixtures("late")
def test_a_row_without_numbers_harms_nobody_and_ends(saved: Saved) -> None:
    """Also where the step behind it has been launched by then, on what it drew."""
    folder, _ = saved("llama")
    expected = generate(runner_for(folder), PROMPTS["b"], WARM, 4)
    runner = runner_for(folder)
    weights = runner.decoder
    forward, steps = weights.forward, iter(range(100))

    def broken(batch, pool):  # type: ignore[no-untyped-def]
        logits = forward(batch, pool)
        if next(steps) == 1:
            logits[0] = torch.nan
        return logits

    weights.forward = broken  # type: ignore[method-assign]
    loop = Loop(runner)
    (a, new_a), (b, new_b) = begin("a", WARM), begin("b", WARM)
    loop.submit(1, a, b, admit=new_a + new_b)
    for position in (1, 2, 3):
        loop.submit(position + 1, follow("a", position), follow("b", position))
    landed = [loop.next() for _ in range(4)]
    loop.close()
    outputs = [event.outputs for event in landed if isinstance(event, BatchDone)]
    assert len(outputs) == 4
    assert [len(a.tokens) for a, _ in outputs] == [1, 0, 0, 0]
    assert outputs[1][0].problem == outputs[2][0].problem is not None
    assert tuple(token for _, b in outputs for token in b.tokens) == expected


@pytest.mark.usefixtures("late")
def test_a_step_that_fails_is_told_in_its_turn(saved: Saved) -> None:
    folder, _ = saved("llama")
    loop = Loop(runner_for(folder))
    a, new_a = begin("a", WARM)
    loop.submit(1, a, admit=new_a)
    loop.submit(2, Row("nobody", 1, (3,), 0, (1,), True))
    loop.submit(3, follow("a", 1))
    first, second, third = (loop.next() for _ in range(3))
    loop.close()
    assert isinstance(first, BatchDone) and isinstance(third, BatchDone)
    assert isinstance(second, BatchFailed) and second.step == 2
    expected = generate(runner_for(folder), PROMPTS["a"], WARM, 2)
    assert first.outputs[0].tokens + third.outputs[0].tokens == expected


def test_what_a_failed_step_drew_is_nobodys(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device fails while it computes; what begins anew afterwards counts from its beginning."""
    folder, _ = saved("llama")
    expected = generate(runner_for(folder), PROMPTS["a"], WARM, 2)

    class Lost(Readback):
        def values(self) -> list[list[float]]:
            raise RuntimeError("an illegal address")

    monkeypatch.setattr(launched, "Readback", Lost)
    runner = runner_for(folder)
    a, new_a = begin("a", WARM)
    with pytest.raises(RuntimeError, match="illegal"):
        runner.run(BatchPlan(1, (a,), new_a))
    monkeypatch.setattr(launched, "Readback", Readback)
    made = [runner.run(BatchPlan(2, (a,), new_a, dropped=(("a", 1),)))]
    made.append(runner.run(BatchPlan(3, (follow("a", 1),))))
    assert tuple(token for (output,) in made for token in output.tokens) == expected
