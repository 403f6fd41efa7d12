"""Batch plans in, tokens out: equal to `generate`, independent of company, safe from a bad row."""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from engine.tiny import VOCAB, admission, generate, greedy, prompt_of
from slipstream.config import SetupError
from slipstream.core.machine import Admission, BatchPlan, Row, RowOutput
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.errors import ErrorCode, Problem
from slipstream.kernels import cpu
from slipstream.kernels.build import VARIABLE
from slipstream.kernels.ops import Quantization
from slipstream.types import SamplingParams

Saved = Callable[[str], tuple[Path, PreTrainedModel]]
WARM = SamplingParams(max_tokens=99, seed=11, temperature=1.3, top_p=0.95)


def runner_for(folder: Path, blocks: int = 64, quantization: Quantization = "none") -> Runner:
    layout = ModelConfig.read(folder).kv_layout("float32")
    pool = allocate_pool(layout, blocks).fill_(torch.nan)
    return Runner(folder, "float32", pool, threads=2, quantization=quantization)


@pytest.fixture(scope="module")
def runner(saved: Saved) -> Runner:
    return runner_for(saved("llama")[0])


def expected(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        *((case, "") for case in ("llama", "llama_tied", "mistral", "qwen2", "qwen3")),
        *(("llama_yarn", ""), ("llama_tied", "triton"), ("qwen3", "triton")),
    ],
)
def test_greedy_tokens_equal_generate(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, case: str, kernels: str
) -> None:
    """Three requests, chunked differently, one joining late, decoding together."""
    if kernels:  # a GPU's, interpreted
        monkeypatch.setenv(VARIABLE, kernels)
    folder, model = saved(case)
    runner = runner_for(folder)
    prompts = {"a": prompt_of(75, 1), "b": prompt_of(40, 2), "c": prompt_of(16, 3)}
    tables = {"a": (5, 60, 7, 8, 9, 1, 33), "b": (40, 2, 41, 42, 43), "c": (50, 10, 30)}
    made: dict[str, list[int]] = {name: [] for name in prompts}

    def prefill(name: str, start: int, end: int) -> Row:
        done = end == len(prompts[name])
        return Row(name, 1, prompts[name][start:end], start, tables[name], done)

    def decode(name: str) -> Row:
        count = len(made[name])
        start = len(prompts[name]) + count - 1
        return Row(name, 1, (), start, tables[name], True, count, after_previous=True)

    def run(*rows: Row, admit: tuple[str, ...] = ()) -> None:
        admitted = tuple(admission(name, prompts[name], greedy()) for name in admit)
        for output in runner.run(BatchPlan(0, rows, admitted)):
            made[output.request_id] += output.tokens

    run(prefill("a", 0, 48), prefill("b", 0, 16), admit=("a", "b"))
    run(prefill("a", 48, 75), prefill("b", 16, 40))
    run(decode("a"), decode("b"))
    run(decode("b"), prefill("c", 0, 16), decode("a"), admit=("c",))
    while len(made["c"]) < (4 if kernels else 20):
        run(*(decode(name) for name in ("c", "a", "b")))
    for name, prompt in prompts.items():
        assert tuple(made[name]) == expected(model, prompt, len(made[name]))


def test_tokens_on_the_row_and_tokens_kept_are_the_same(runner: Runner) -> None:
    """The decode input may come with the plan (a first step after a hand-over) or lie here."""
    prompt = prompt_of(20)
    (first, second, third) = generate(runner, prompt, greedy(), 3)
    rows = (
        Row("x", 1, prompt, 0, (1, 2), True),
        Row("x", 1, (first,), 20, (1, 2), True, 1),
        Row("x", 1, (), 21, (1, 2), True, 2, after_previous=True),
    )
    made = [
        runner.run(BatchPlan(0, (row,), (admission("x", prompt, greedy()),) if i == 0 else ()))
        for i, row in enumerate(rows)
    ]
    assert [output.tokens for (output,) in made] == [(first,), (second,), (third,)]


@pytest.mark.parametrize(
    "sampling",
    [
        greedy(),
        WARM,
        SamplingParams(
            max_tokens=99,
            seed=-3,
            choice=2,
            temperature=1.0,
            repetition_penalty=1.4,
            presence_penalty=0.5,
            frequency_penalty=0.8,
            min_tokens=9,
            logprobs=2,
        ),
    ],
)
def test_any_worker_continues_at_any_position(saved: Saved, sampling: SamplingParams) -> None:
    """Prompt, accepted tokens and sampling parameters are the whole journal of a stream."""
    folder, _ = saved("qwen3")
    prompt = prompt_of(37)
    whole = generate(runner_for(folder), prompt, sampling, 24)
    assert len(set(whole)) > 5
    for cut in (1, 7, 23):
        other = runner_for(folder)
        rest = generate(other, prompt, sampling, 24 - cut, accepted=whole[:cut], request_id="z")
        assert whole[:cut] + rest == whole


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_company_changes_nothing(saved: Saved, quantization: Quantization) -> None:
    runner = runner_for(saved("llama")[0], quantization=quantization)
    prompts = [prompt_of(18 + i, i) for i in range(6)]
    params = [
        SamplingParams(max_tokens=99, seed=i, temperature=t, top_k=k, min_p=m)
        for i, (t, k, m) in enumerate(
            [
                (1.0, 0, 0.0),
                (0.0, 0, 0.0),
                (2.0, 9, 0.0),
                (0.7, 0, 0.05),
                (1.0, 3, 0.0),
                (1.5, 0, 0),
            ]
        )
    ]
    alone = [generate(runner, p, s, 12) for p, s in zip(prompts, params, strict=True)]
    made: list[list[int]] = [[] for _ in prompts]
    for step in range(12):
        rows = [
            Row(f"m{i}", 1, prompt, 0, tuple(range(4 * i, 4 * i + 4)), True)
            if step == 0
            else Row(
                f"m{i}",
                1,
                (),
                len(prompt) + step - 1,
                tuple(range(4 * i, 4 * i + 4)),
                True,
                step,
                after_previous=True,
            )
            for i, prompt in enumerate(prompts)
        ]
        admitted = tuple(
            admission(f"m{i}", p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))
        )
        for i, output in enumerate(
            runner.run(BatchPlan(step, tuple(rows), admitted * (step == 0)))
        ):
            made[i] += output.tokens
    assert [tuple(tokens) for tokens in made] == alone


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_int8_answers_do_not_depend_on_chunks(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, case: str, compiled: bool
) -> None:
    """And they are those of other weights: near the plain ones, not the same."""
    if not compiled:
        monkeypatch.setattr(cpu, "kernels", lambda: None)
    folder, _ = saved(case)
    runner, prompt = runner_for(folder, quantization="int8"), prompt_of(75)
    sampling = msgspec.structs.replace(WARM, logprobs=0)
    whole = generate(runner, prompt, sampling, 24)
    for ends in ((64, 75), (16, 32, 48, 75), (1, 2, 74, 75)):
        start, made = 0, ()
        admitted: tuple[Admission, ...] = (admission("c", prompt, sampling),)
        for end in ends:
            row = Row("c", 1, prompt[start:end], start, tuple(range(9, 0, -1)), end == 75)
            outputs = runner.run(BatchPlan(0, (row,), admitted))
            start, admitted = end, ()
        (output,) = outputs
        made = output.tokens
        for step in range(1, 24):
            row = Row("c", 1, (), 74 + step, tuple(range(9, 0, -1)), True, step, True)
            (output,) = runner.run(BatchPlan(step, (row,)))
            made += output.tokens
        assert made == whole
    row = Row("p", 1, prompt, 0, tuple(range(9)), True)
    plan = BatchPlan(0, (row,), (admission("p", prompt, greedy(logprobs=20)),))
    ((one,), (other,)) = (each.run(plan) for each in (runner, runner_for(folder)))
    assert one.logprobs is not None and other.logprobs is not None
    tops = [dict(output.logprobs[0].top) for output in (one, other)]
    common = tops[0].keys() & tops[1].keys()
    gaps = [abs(tops[0][token] - tops[1][token]) for token in common]
    assert len(common) >= 15 and 0 < max(gaps) < 0.5


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_row_of_nan_harms_nobody_else(
    saved: Saved, caplog: pytest.LogCaptureFixture, quantization: Quantization
) -> None:
    """Block 30 holds NaN where the second request believes its prefix to be."""
    runner = runner_for(saved("llama")[0], quantization=quantization)
    prompt = prompt_of(20)
    alone = generate(runner, prompt, greedy(), 2, blocks=(1, 2))
    runner._pool[30] = torch.nan
    good = Row("good", 1, prompt, 0, (1, 2), True)
    bad = Row("bad", 1, prompt[16:], 16, (30, 31), True)
    admitted = (admission("good", prompt, greedy()), admission("bad", prompt, WARM))
    with caplog.at_level(logging.WARNING):
        outputs = runner.run(BatchPlan(0, (bad, good), admitted))
    problem = Problem(code=ErrorCode.INTERNAL, message="The model made no number.")
    failed = RowOutput("bad", 1, (), problem=problem)
    assert outputs == (failed, RowOutput("good", 1, alone[:1]))
    assert "bad" in caplog.text and "good" not in caplog.text
    # A step that was planned before the failure was known.
    good = Row("good", 1, (), 20, (1, 2), True, 1, after_previous=True)
    bad = Row("bad", 1, (), 20, (30, 31), True, 1, after_previous=True)
    outputs = runner.run(BatchPlan(1, (bad, good)))
    assert outputs == (failed, RowOutput("good", 1, alone[1:]))


def test_rows_that_do_not_sample_say_nothing(runner: Runner) -> None:
    prompt = prompt_of(40)
    rows = (
        Row("p", 1, prompt[:32], 0, (1, 2, 3), False),
        Row("q", 1, prompt[:32], 0, (4, 5), True),
    )
    admitted = (admission("p", prompt, greedy()), admission("q", prompt[:32], greedy()))
    (output,) = runner.run(BatchPlan(0, rows, admitted))
    assert output.request_id == "q"
    assert runner.run(BatchPlan(1, (Row("p", 1, prompt[32:38], 32, (1, 2, 3), False),))) == ()
    assert runner.run(BatchPlan(2, ())) == ()


def test_dropped_requests_are_forgotten_and_attempts_are_apart(runner: Runner) -> None:
    prompt = prompt_of(10)
    row = Row("d", 1, prompt, 0, (1,), True)
    runner.run(BatchPlan(0, (row,), (admission("d", prompt, greedy()),)))
    with pytest.raises(KeyError):
        runner.run(BatchPlan(1, (Row("d", 2, prompt, 0, (1,), True),)))
    # Dropped and admitted anew in one plan: a preempted request that comes back.
    again = (admission("d", prompt, greedy()),)
    (output,) = runner.run(BatchPlan(2, (row,), again, dropped=(("d", 1),)))
    assert len(output.tokens) == 1
    runner.run(BatchPlan(3, (), dropped=(("d", 1), ("never", 1))))
    with pytest.raises(KeyError):
        runner.run(BatchPlan(4, (row,)))


def test_a_position_is_sampled_again_the_same_way(runner: Runner) -> None:
    prompt = prompt_of(10)
    sampling = SamplingParams(max_tokens=9, seed=4, temperature=2.0, frequency_penalty=1.0)
    row = Row("e", 1, prompt, 0, (1, 2), True)
    (first,) = runner.run(BatchPlan(0, (row,), (admission("e", prompt, sampling),)))
    follow = Row("e", 1, first.tokens, 10, (1, 2), True, 1)
    (second,) = runner.run(BatchPlan(1, (follow,)))
    assert runner.run(BatchPlan(2, (row,))) == (first,)
    assert runner.run(BatchPlan(3, (follow,))) == (second,)
    with pytest.raises(ValueError, match="position 3 after 2 outputs"):
        runner.run(BatchPlan(4, (Row("e", 1, (5,), 12, (1, 2), True, 3),)))


def test_nothing_is_planned_behind_a_sample_that_is_not_known(runner: Runner) -> None:
    """What may follow it the device proposes itself."""
    prompt = prompt_of(20)
    runner.run(
        BatchPlan(0, (Row("s", 1, prompt, 0, (1, 2), True),), (admission("s", prompt, greedy()),))
    )
    guess = Row("s", 1, (7,), 20, (1, 2), True, 1, after_previous=True)
    with pytest.raises(ValueError, match="s: 1 tokens behind a sample"):
        runner.run(BatchPlan(1, (guess,)))


def test_logprobs_are_those_of_the_raw_logits(saved: Saved, runner: Runner) -> None:
    _, model = saved("llama")
    prompt = prompt_of(30)
    sampling = SamplingParams(
        max_tokens=1, seed=1, temperature=0.3, top_k=2, repetition_penalty=3.0, logprobs=3
    )
    row = Row("l", 1, prompt, 0, (1, 2), True)
    (output,) = runner.run(BatchPlan(0, (row,), (admission("l", prompt, sampling),)))
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert output.logprobs is not None
    (entry,) = output.logprobs
    assert entry.token_id == output.tokens[0]
    assert entry.logprob == pytest.approx(float(wanted[entry.token_id]), abs=1e-4)
    assert [token for token, _ in entry.top] == wanted.topk(3).indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(
        wanted.topk(3).values.tolist(), abs=1e-4
    )


def test_a_pool_of_another_layout_is_refused(saved: Saved) -> None:
    folder, _ = saved("llama")
    layout = ModelConfig.read(folder).kv_layout("float32")
    with pytest.raises(ValueError, match="layout"):
        Runner(folder, "bfloat16", allocate_pool(layout, 4))
    with pytest.raises(ValueError, match="layout"):
        Runner(folder, "float32", torch.zeros(4, 1, *layout.block_shape[1:]))


def test_tokens_stay_inside_the_vocabulary(runner: Runner) -> None:
    for seed in range(20):
        hot = SamplingParams(max_tokens=9, seed=seed, temperature=2.0)
        assert all(0 <= token < VOCAB for token in generate(runner, (3,), hot, 3))


def test_a_model_that_takes_long_to_load_says_how_far_it_is(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the words that `slipstream serve` makes a bar of."""
    folder, _ = saved("llama")
    config = ModelConfig.read(folder)
    pool = allocate_pool(config.kv_layout("float32"), 4)
    caplog.set_level(logging.INFO, "slipstream.engine.weights")
    Runner(folder, "float32", pool)
    assert "weights:" not in caplog.text, "not of one that is there at once"
    monkeypatch.setattr("slipstream.engine.weights.SAID_EVERY_S", 0.0)
    Runner(folder, "float32", pool)
    said = [record.message for record in caplog.records if "weights:" in record.message]
    layers = config.num_layers
    assert said == [f"weights: {done} of {layers} layers" for done in range(layers)]


def test_log_probabilities_of_a_prompt(saved: Saved) -> None:
    """In chunks, beside a stream that decodes: what the model gives to each token that is there."""
    folder, model = saved("llama")
    runner = runner_for(folder)
    prompt, other = prompt_of(75, 1), prompt_of(16, 3)
    table = (5, 60, 7, 8, 9)
    sampling = msgspec.structs.replace(greedy(), prompt_logprobs=2)
    beside = Row("b", 1, other, 0, (50, 51), True)
    chunks = [
        Row("a", 1, prompt[:48], 0, table, False, prompt_logprobs=48),
        Row("a", 1, prompt[48:], 48, table, True, prompt_logprobs=26),
    ]
    admitted = (admission("b", other, greedy()), admission("a", prompt, sampling))
    first = runner.run(BatchPlan(1, (beside, chunks[0]), admitted))
    again = Row("b", 1, (), 16, (50, 51), True, 1, after_previous=True)
    second = runner.run(BatchPlan(2, (chunks[1], again)))
    assert [(o.request_id, len(o.tokens), len(o.prompt_logprobs)) for o in (*first, *second)] == [
        *(("b", 1, 0), ("a", 0, 48)),
        *(("a", 1, 26), ("b", 1, 0)),
    ]
    assert second[0].tokens == expected(model, prompt, 1)
    assert first[0].tokens + second[1].tokens == expected(model, other, 2)
    scores = first[1].prompt_logprobs + second[0].prompt_logprobs
    assert tuple(score.token_id for score in scores) == prompt[1:]
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1].float(), -1)
    for score, row in zip(scores, wanted, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-3)
        top = row.topk(2)
        assert [value for _, value in score.top] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_float8_blocks_serve_nearly_as_well(saved: Saved, caplog: pytest.LogCaptureFixture) -> None:
    """By the reference on a CPU, and said so."""
    folder, _ = saved("llama")
    config = ModelConfig.read(folder)
    assert (
        config.kv_layout("float8_e4m3fn").block_bytes * 4 == config.kv_layout("float32").block_bytes
    )
    made = []
    for dtype in ("float32", "float8_e4m3fn"):
        runner = Runner(folder, "float32", allocate_pool(config.kv_layout(dtype), 8), threads=2)
        made.append(generate(runner, prompt_of(40), greedy(), 3, blocks=(1, 5, 3, 2)))
        # Without compiled kernels everything is slow, and that is said once for all.
        said = "SLOW: no CPU kernels for float8" in caplog.text
        assert said == (dtype == "float8_e4m3fn" and cpu.kernels() is not None)
    assert made[0] == made[1]


def test_a_gpu_refuses_int8(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(SetupError, match="int8 weights are for CPUs; give --quantization fp8"):
        runner_for(saved("llama")[0], quantization="int8")
