"""What is proposed, and that an answer is the same whatever is proposed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from llguidance import LLMatcher
from transformers import PreTrainedModel

from engine.test_runner import WARM, runner_for
from engine.tiny import VOCAB, WORDS, admission, generate, greedy, prompt_of
from slipstream.core.machine import BatchPlan, Row
from slipstream.engine.drafts import AT_A_TIME, LOOK_BACK, SIZES, Drafts
from slipstream.engine.runner import Runner
from slipstream.engine.sampler import RowError, sample
from slipstream.errors import ErrorCode, Problem
from slipstream.types import SamplingParams

Saved = Callable[[str], tuple[Path, PreTrainedModel]]


def looked_up(tokens: Sequence[int], count: int) -> tuple[int, ...]:
    """What followed the last time that the last tokens stood there, by looking everywhere."""
    for size in SIZES:
        for begin in range(len(tokens) - 1, size - 1, -1):
            if tuple(tokens[begin - size : begin]) == tuple(tokens[-size:]):
                return tuple(tokens[begin : begin + count])
    return ()


@pytest.mark.parametrize("seed", range(30))
def test_what_followed_the_last_time_is_proposed(seed: int) -> None:
    draw = Random(seed)
    tokens = [draw.randrange(4) for _ in range(draw.randrange(1, 40))]
    drafts, most = Drafts(), 1
    for _ in range(60):
        limit = draw.randrange(6)
        proposed = drafts.propose(tokens, limit)
        assert proposed == looked_up(tokens, min(limit, most))[: min(limit, most)]
        right = draw.randrange(len(proposed) + 1)
        drafts.learn(len(proposed), right)
        most = 2 * right + 1 if proposed else most
        tokens += [*proposed[:right], draw.randrange(4)]
        if draw.random() < 0.1:
            del tokens[draw.randrange(1, len(tokens) + 1) :]
            drafts.forget()


def test_a_short_text_proposes_nothing() -> None:
    assert Drafts().propose([7], 4) == () == Drafts().propose([7, 7], 4)


def test_what_it_knows_is_bounded_and_learnt_in_pieces() -> None:
    text = [index % 3000 for index in range(4 * LOOK_BACK)]
    drafts = Drafts()
    assert drafts.propose(text[:2900], 1) == (), "they have not stood there before"
    proposed = 0
    for end in range(2901, len(text)):
        found = drafts.propose(text[:end], 4)
        assert not found or found == tuple(text[end : end + 1])
        drafts.learn(len(found), 0)
        proposed += bool(found)
        assert len(drafts._follows) <= 2 * LOOK_BACK * len(SIZES) + AT_A_TIME
    assert proposed > 3 * LOOK_BACK


STRICT = SamplingParams(
    max_tokens=99,
    seed=5,
    temperature=0.8,
    top_p=0.9,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    min_tokens=6,
    logprobs=2,
)


HELD = SamplingParams(
    max_tokens=99,
    seed=6,
    temperature=0.9,
    grammar=LLMatcher.grammar_from_regex(r"([a-f]{2,5}[ ,.:]){9,}"),
    min_tokens=12,
    bad_tokens=((70,), (70, 71), (5, 6, 7)),
    logit_bias=((67, 2.0), (9, -3.0)),
)


@pytest.mark.parametrize("sampling", [greedy(logprobs=1), WARM, STRICT, HELD])
@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_the_same_whatever_is_proposed(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, seed: int
) -> None:
    """Two streams in one batch, planned one step ahead or not."""
    runner, draw = runner_for(saved(WORDS)[0]), Random(seed)
    prompts = {name: prompt_of(length, length) for name, length in (("a", 37), ("b", 21))}
    answers = {name: generate(runner, prompt, sampling, 40) for name, prompt in prompts.items()}
    tables = {"a": tuple(range(1, 8)), "b": tuple(range(10, 16))}

    def propose(self: Drafts, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What is right, wrong at times, fewer than allowed at times."""
        name = next(n for n, prompt in prompts.items() if tuple(tokens[: len(prompt)]) == prompt)
        begin = len(tokens) - len(prompts[name])
        following = answers[name][begin : begin + draw.randrange(most + 1)]
        return tuple(t if draw.random() < 0.8 else draw.randrange(VOCAB) for t in following)

    monkeypatch.setattr(Drafts, "propose", propose)
    made: dict[str, list[int]] = {name: [] for name in prompts}
    steps = drafted = 0
    after_previous = False
    while any(len(tokens) < 40 for tokens in made.values()):
        rows = [_row(name, prompts[name], made[name], tables[name], draw, after_previous)
                for name in prompts if len(made[name]) < 40]  # fmt: skip
        admitted = [admission(name, prompts[name], sampling) for name in prompts]
        outputs = runner.run(BatchPlan(steps, tuple(rows), tuple(admitted) if not steps else ()))
        for row, output in zip(rows, outputs, strict=True):
            assert 1 <= len(output.tokens) <= output.drafted + 1 <= row.drafts + 1
            assert (sampling.logprobs is None) == (output.logprobs is None)
            assert [e.token_id for e in output.logprobs or ()] in ([], list(output.tokens))
            made[output.request_id] += output.tokens
            drafted += output.drafted
        steps, after_previous = steps + 1, draw.random() < 0.5
    assert {name: tuple(tokens[:40]) for name, tokens in made.items()} == answers
    assert drafted > 20 and steps < 60


def _row(
    name: str,
    prompt: tuple[int, ...],
    made: list[int],
    table: tuple[int, ...],
    draw: Random,
    after_previous: bool,
) -> Row:
    """As planned once all of `made` is known, or when one token of the last step was sure."""
    if not made:
        return Row(name, 1, prompt, 0, table, True)
    start, drafts = len(prompt) + len(made) - 1, draw.randrange(6)
    if not after_previous:
        return Row(name, 1, (made[-1],), start, table, True, len(made), drafts=drafts)
    unknown = draw.randrange(min(3, len(made)))
    return Row(
        *(name, 1, (), start - unknown, table, True, len(made) - unknown),
        after_previous=True,
        drafts=drafts,
    )


def test_a_request_of_a_step_that_failed_draws_nothing_any_more(saved: Saved) -> None:
    """The step after it was planned before, with rows of others too."""
    runner: Runner = runner_for(saved("llama")[0])
    prompt, other = prompt_of(20), prompt_of(9, 3)
    alone = generate(runner, other, greedy(), 2)
    admitted = (admission("x", prompt, greedy()), admission("y", other, greedy()))
    first = Row("x", 1, prompt, 0, (), True), Row("y", 1, other[:4], 0, (5,), False)
    with pytest.raises(ValueError, match="x: 0 blocks do not hold 20 tokens"):
        runner.run(BatchPlan(1, first, admitted))
    ahead = Row("x", 1, (), 20, (1, 2), True, 1, after_previous=True)
    outputs = runner.run(BatchPlan(2, (ahead, Row("z", 1, other, 0, (6,), True)),
                                   (admission("z", other, greedy()),)))  # fmt: skip
    assert [output.tokens for output in outputs] == [(), alone[:1]]


def test_a_row_that_fails_behind_a_right_draft_has_drawn_what_it_drew(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request may end with that, as it would have without drafts. If not, it fails next."""
    runner, prompt = runner_for(saved("llama")[0]), prompt_of(20)
    answer = generate(runner, prompt, greedy(), 4)
    monkeypatch.setattr(Drafts, "propose", lambda _, tokens, most: answer[1 : 1 + most])
    first = Row("x", 1, prompt, 0, (1, 2), True)
    runner.run(BatchPlan(1, (first,), (admission("x", prompt, greedy()),)))
    calls: list[int] = []
    problem = Problem(code=ErrorCode.INTERNAL, message="x")

    def failing(*arguments: Any) -> list[object]:
        calls.append(len(arguments[2]))
        return [RowError("x", problem)] if len(calls) == 2 else [*sample(*arguments)]

    monkeypatch.setattr("slipstream.engine.runner.sample", failing)
    row = Row("x", 1, (answer[0],), 20, (1, 2), True, 1, drafts=2)
    (output,) = runner.run(BatchPlan(2, (row,)))
    assert (output.tokens, output.problem) == (answer[1:2], None) and calls == [1, 1]
    for ahead in (Row("x", 1, (), 21, (1, 2), True, 2, True, 2), row):
        (output,) = runner.run(BatchPlan(3, (ahead,)))
        assert (output.tokens, output.problem) == ((), problem)
