"""Answers under a grammar: they follow it to its end, wherever and in whatever steps they are
made."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import torch
from llguidance import LLMatcher
from transformers import PreTrainedModel

from engine.test_runner import runner_for
from engine.test_sampler import logits_of
from engine.tiny import WORDS, WORDS_VOCAB, admission, generate, greedy, prompt_of
from slipstream import grammar as grammar_module
from slipstream.core.machine import BatchPlan, Row, RowOutput
from slipstream.engine import guide as guide_module
from slipstream.engine import sampler
from slipstream.engine.guide import Guides
from slipstream.engine.history import History
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.runner import Runner
from slipstream.engine.sampler import RowError, Sample
from slipstream.errors import ErrorCode
from slipstream.grammar import (
    KEPT_CHARS_MAX,
    KEPT_CPU_S,
    KEPT_MAX,
    GrammarError,
    Grammars,
    tokenizer,
)
from slipstream.kernels.reference import Reference
from slipstream.types import SamplingParams
from tokenizer.models import demo_folder

Saved = Callable[[str], tuple[Path, PreTrainedModel]]
EOS = 2
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 3, "maximum": 1200},
        "kinds": {"type": "array", "items": {"enum": ["a", "bc", "d\u00e9"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"const": True}]},
    },
    "required": ["name", "size", "kinds", "next"],
    "additionalProperties": False,
}


def grammar_of(schema: dict[str, Any]) -> str:
    strict: Any = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=strict)


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def held(grammar: str, **changes: Any) -> SamplingParams:
    wanted = {"max_tokens": 200, "seed": 0, "temperature": 1.0, "grammar": grammar, **changes}
    return SamplingParams(**wanted)


@pytest.fixture(scope="module")
def folder(saved: Saved) -> Path:
    return saved(WORDS)[0]


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    return runner_for(folder)


@pytest.fixture(scope="module")
def guides(folder: Path) -> Guides:
    return Guides(folder, ModelConfig.read(folder))


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(tokenizer(folder, WORDS_VOCAB, {EOS}))


def ended(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The answer, which has come to its end; after that there is nothing but ends."""
    assert EOS in tokens, "no end"
    answer = tokens[: tokens.index(EOS)]
    assert set(tokens[len(answer) :]) == {EOS}
    return answer


# --- What is drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_json_follows_its_schema(runner: Runner, grammars: Grammars, seed: int) -> None:
    """Of a model that knows no word; its logits have ids that are no tokens."""
    sampling = held(grammar_of(SCHEMA), seed=seed)
    answer = ended(generate(runner, prompt_of(20, seed), sampling, 100))
    jsonschema.validate(json.loads(grammars.tokens.decode_str(list(answer))), SCHEMA)


@pytest.mark.parametrize("seed", range(3))
def test_json_of_the_demo_tokenizer_follows_its_schema(seed: int) -> None:
    """Of logits that are noise, over 49,152 tokens."""
    folder = demo_folder()
    if folder is None:
        pytest.skip("no demo model")
    config = ModelConfig.read(folder)
    guides = Guides(folder, config)
    tokens = tokenizer(folder, config.vocab_size, config.eos_token_ids)
    sampling = held(grammar_of(SCHEMA), seed=seed)
    one = history(guides, sampling)
    while not (one.num_output and one.tokens[-1] in config.eos_token_ids):
        row = logits_of(1000 * seed + one.num_output, vocab=config.vocab_size)
        (result,) = sampler.sample(Reference(), row[None], [0], [one], config.eos_token_ids)
        assert isinstance(result, Sample)
        one.append(result.token)
    answer = tokens.decode_str(one.tokens[1:-1])
    jsonschema.validate(json.loads(answer), SCHEMA)


def test_a_moved_answer_is_the_same_after_every_token(runner: Runner, folder: Path) -> None:
    other, prompt = runner_for(folder), prompt_of(20)
    sampling = held(grammar_of(SCHEMA), seed=5, presence_penalty=0.5)
    whole = generate(runner, prompt, sampling, 100)
    length = len(ended(whole)) + 2
    assert length > 15
    for count in range(length):
        rest = generate(other, prompt, sampling, length - count, accepted=whole[:count])
        assert rest == whole[count:length], f"moved after {count} tokens"


def test_a_position_is_sampled_again_the_same_way(runner: Runner) -> None:
    """Back from any place to any earlier one, also over the grammar's end."""
    prompt, sampling = prompt_of(10), held(regex("[ab]{3}(c|d)"), seed=1)
    made = generate(runner, prompt, sampling, 7)
    assert len(ended(made)) <= 4
    table = (1, 2)
    rows = [Row("e", 1, prompt, 0, table, True)]
    rows += [Row("e", 1, (made[i],), 10 + i, table, True, i + 1) for i in range(6)]
    admitted = (admission("e", prompt, sampling),)
    for index in [0, 1, 2, 3, 4, 5, 6, 2, 3, 0, 1, 1, 2, 3, 4, 5, 0]:
        (output,) = runner.run(BatchPlan(index, (rows[index],), admitted))
        admitted = ()
        assert output.tokens == made[index : index + 1]
    runner.run(BatchPlan(9, (), dropped=(("e", 1),)))


def history(guides: Guides, sampling: SamplingParams, tokens: tuple[int, ...] = (9,)) -> History:
    return History(admission("r", tokens, sampling, 1), guides.guide(sampling.grammar, 1))


def drawn(one: History) -> list[Sample | RowError]:
    """Of logits that favour nothing."""
    flat = torch.zeros(1, WORDS_VOCAB)
    return sampler.sample(Reference(), flat, [0], [one], frozenset({EOS}))


def draws(grammars: Grammars, guides: Guides, text: str, **changes: Any) -> set[str]:
    """What may be drawn after `text`, by some seed; the end is `.`"""
    output = tuple(grammars.tokens.tokenize_str(text))
    found = set()
    for seed in range(30):
        one = history(guides, held(seed=seed, **changes), (9, *output))
        (result,) = sampler.sample(
            Reference(), torch.zeros(1, WORDS_VOCAB), [0], [one], frozenset({EOS})
        )
        assert isinstance(result, Sample)
        found.add("." if result.token == EOS else grammars.tokens.decode_str([result.token]))
    return found


@pytest.mark.parametrize(
    ("text", "changes", "wanted"),
    [
        ("", {}, {"x"}),
        ("x", {}, {"y", "."}),
        ("xy", {}, {"."}),
        ("x", {"ignore_eos": True}, {"y"}),
        ("xy", {"ignore_eos": True}, {"."}),
        ("x", {"min_tokens": 2}, {"y"}),
        ("x", {"min_tokens": 1}, {"y", "."}),
        ("xy", {"min_tokens": 9, "ignore_eos": True}, {"."}),
        ("", {"min_tokens": 1, "stop_token_ids": (90,)}, {"x"}),
        ("x", {"logit_bias": ((EOS, 99.0),)}, {"."}),
        ("x", {"logit_bias": ((9, 99.0), (EOS, -99.0))}, {"y"}),
    ],
    ids=str,
)
def test_the_end_of_a_grammar_ends_the_answer(
    grammars: Grammars, guides: Guides, text: str, changes: dict[str, Any], wanted: set[str]
) -> None:
    """And is put off for as long as something else may follow, not longer."""
    if "stop_token_ids" in changes:
        assert grammars.tokens.tokenize_str("x") == list(changes["stop_token_ids"])
    assert draws(grammars, guides, text, grammar=regex("xy?"), **changes) == wanted


# --- What cannot be followed ----------------------------------------------------------------------


def outcome(runner: Runner, *samplings: SamplingParams) -> tuple[RowOutput, ...]:
    """Of the first token of each, in one batch."""
    prompt = prompt_of(12)
    rows = tuple(Row(f"o{i}", 1, prompt, 0, (i,), True) for i in range(len(samplings)))
    admitted = tuple(admission(f"o{i}", prompt, each) for i, each in enumerate(samplings))
    outputs = runner.run(BatchPlan(1, rows, admitted))
    runner.run(BatchPlan(2, (), dropped=tuple((row.request_id, 1) for row in rows)))
    return outputs


def test_who_cannot_be_held_to_a_grammar_ends_and_harms_nobody(runner: Runner) -> None:
    bad, good = held("{}"), held(regex("ab"))
    none = held(regex("ab"), allowed_token_ids=(7,))
    first, second, third, fourth = outcome(runner, bad, good, none, greedy())
    assert first.tokens == () and first.problem is not None
    assert first.problem.code is ErrorCode.INVALID_SCHEMA
    assert third.tokens == () and third.problem is not None
    assert third.problem.code is ErrorCode.INVALID_VALUE
    assert (len(second.tokens), second.problem) == (len(fourth.tokens), fourth.problem) == (1, None)


def test_a_model_without_tokenizer_says_so_and_serves_the_rest(
    saved: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        runner = runner_for(saved("llama")[0])
    assert "answers cannot be held to a grammar" in caplog.text
    refused, served = outcome(runner, held(regex("ab")), greedy())
    assert refused.problem is not None and served.tokens
    assert refused.problem.code is ErrorCode.INTERNAL
    assert "no tokenizer.json that can be used" in refused.problem.message


def test_a_tokenizer_that_breaks_its_reader_harms_grammars_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A panic is no Exception."""

    class Panic(BaseException):
        pass

    def broken(*arguments: object) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr(guide_module, "tokenizer", broken)
    with caplog.at_level(logging.WARNING):
        refused, served = outcome(runner_for(folder), held(regex("ab")), greedy())
    assert refused.problem is not None and served.tokens
    assert "cannot be held to a grammar: index out of bounds" in caplog.text


def test_an_answer_that_left_its_grammar_goes_on_nowhere(
    grammars: Grammars, guides: Guides
) -> None:
    strayed = tuple(grammars.tokens.tokenize_str("ac"))
    one = history(guides, held(regex("ab+")), (9, *strayed))
    (result,) = sampler.sample(
        Reference(), torch.zeros(1, WORDS_VOCAB), [0], [one], frozenset({EOS})
    )
    assert isinstance(result, RowError) and result.problem.code is ErrorCode.INVALID_SCHEMA
    assert f"token {strayed[-1]} of the answer does not follow it" in result.problem.message


class Stuck:
    """Grammars of which the first one asked for compiles for as long as a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.asked = threading.Event(), list[str]()
        compiled = Grammars.matcher

        def matcher(grammars: Grammars, grammar: str) -> LLMatcher:
            self.asked.append(grammar)
            assert self.go.wait(30.0)
            return compiled(grammars, grammar)

        monkeypatch.setattr(Grammars, "matcher", matcher)
        monkeypatch.setattr(guide_module, "COMPILE_TIMEOUT_S", 0.3)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    one = Stuck(monkeypatch)
    yield one
    one.go.set()


def test_no_step_waits_for_a_grammar_for_ever(folder: Path, stuck: Stuck) -> None:
    """And for three no longer than for one. They may come again; the fourth row is not harmed."""
    runner = runner_for(folder)
    began_s = time.monotonic()
    *late, served = outcome(runner, *(held(regex(f"a{i}")) for i in range(3)), greedy())
    assert 0.3 <= time.monotonic() - began_s < 0.6
    for each in late:
        assert each.problem is not None and not each.tokens
        assert each.problem.code is ErrorCode.QUEUE_FULL and each.problem.retry_after_s
    assert served.tokens and served.problem is None
    stuck.go.set()
    (again,) = outcome(runner, held(regex("a0")))
    assert again.tokens and again.problem is None


def test_what_nobody_waits_for_is_not_compiled(folder: Path, stuck: Stuck) -> None:
    """Requests that were cancelled: the one after them waits for the first alone."""
    runner = runner_for(folder)
    outcome(runner, *(held(regex(f"a{i}")) for i in range(30)))
    stuck.go.set()
    (served,) = outcome(runner, held(regex("b")))
    assert served.tokens and stuck.asked == [regex("a0"), regex("b")]


# --- Compiled grammars ----------------------------------------------------------------------------


def test_matchers_of_one_grammar_are_apart(grammars: Grammars) -> None:
    one, other = grammars.matcher(regex("ab")), grammars.matcher(regex("ab"))
    assert one.consume_tokens(grammars.tokens.tokenize_str("ab")) and one.is_stopped()
    assert not other.is_stopped() and not grammars.matcher(regex("ab")).is_stopped()


def test_what_is_kept_is_bounded(folder: Path) -> None:
    grammars = Grammars(tokenizer(folder, WORDS_VOCAB, {EOS}))
    for number in range(KEPT_MAX + 5):
        grammars.matcher(regex(f"a{number}"))
        grammars.matcher(regex("a0"))
    assert len(grammars._kept) == KEPT_MAX and regex("a0") in grammars._kept
    assert grammars._chars == sum(map(len, grammars._kept))
    assert grammars._cpu_s == pytest.approx(sum(cpu_s for _, cpu_s in grammars._kept.values()))
    long = {"description": "x" * (KEPT_CHARS_MAX // 3), "type": "null"}
    for number in range(4):
        grammars.matcher(grammar_of({**long, "title": str(number)}))
    assert len(grammars._kept) == 2 and grammars._chars <= KEPT_CHARS_MAX
    assert not grammars.matcher(regex("a0")).is_error(), "compiled anew"


def test_what_took_long_to_compile_is_large_and_keeps_little_else(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, spent_s = Grammars(grammars.tokens), iter(range(100))
    monkeypatch.setattr(grammar_module.time, "thread_time", lambda: float(next(spent_s)))
    for number in range(9):
        grammars.matcher(regex(f"a{number}"))
    assert list(grammars._kept) == [regex(f"a{number}") for number in range(4, 9)]
    assert grammars._cpu_s == KEPT_CPU_S


@pytest.mark.parametrize("grammar", ["", "x", "{}", regex("("), grammar_of({"type": "strong"})])
def test_a_grammar_that_is_none_is_refused_in_one_line(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(GrammarError) as refused:
        grammars.matcher(grammar)
    assert str(refused.value) and "\n" not in str(refused.value)


def test_a_grammar_of_too_much_is_refused(grammars: Grammars) -> None:
    many = {f"k{i}": {"type": "string"} for i in range(5000)}
    with pytest.raises(GrammarError, match="too big"):
        grammars.matcher(grammar_of({"type": "object", "properties": many}))


@pytest.mark.parametrize(("vocab", "ends"), [(99, {EOS}), (501, set()), (501, {501})])
def test_tokens_that_do_not_go_with_the_model(folder: Path, vocab: int, ends: set[int]) -> None:
    with pytest.raises(GrammarError, match=r"tokenizer\.json: "):
        tokenizer(folder, vocab, ends)


def test_params_with_a_grammar_cross_the_wire() -> None:
    sampling = held(grammar_of(SCHEMA), bad_tokens=((1, 2), (3,)), logit_bias=((4, -1.5),))
    packed = msgspec.msgpack.encode(sampling)
    assert msgspec.msgpack.decode(packed, type=SamplingParams) == sampling
