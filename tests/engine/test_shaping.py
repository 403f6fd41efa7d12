"""Each rule against a plain reading of it, together and in any order of tokens."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.test_sampler import backend, history, logits_of, params, sample
from slipstream.engine.sampler import RowError, Sample
from slipstream.engine.shaping import Shaping
from slipstream.errors import ErrorCode
from slipstream.types import SamplingParams

VOCAB = 24
EOS = frozenset({1, 5})
assert backend  # each test draws with both
TOKENS = st.integers(-1, VOCAB + 3)
"""Some of them are none of the model's."""
FEW = st.integers(0, 2)
PARAMS = st.fixed_dictionaries(
    {
        "logit_bias": st.lists(st.tuples(TOKENS, st.floats(-100, 100, width=32)), max_size=6),
        "allowed_token_ids": st.one_of(st.just([]), st.lists(TOKENS, max_size=VOCAB)),
        "bad_tokens": st.lists(st.lists(FEW, min_size=1, max_size=4).map(tuple), max_size=8),
        "min_tokens": st.integers(0, 12),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(TOKENS, max_size=3),
    }
).map(lambda drawn: {k: tuple(v) if isinstance(v, list) else v for k, v in drawn.items()})


def plainly(row: Sequence[float], p: SamplingParams, output: Sequence[int]) -> list[float]:
    """What becomes of each logit, one by one, as the parameters say it."""
    bias, result = dict(p.logit_bias), []
    for token, logit in enumerate(row):
        barred = bool(p.allowed_token_ids) and token not in p.allowed_token_ids
        for bad in p.bad_tokens:
            said = [*output, token]
            barred |= len(said) >= len(bad) and tuple(said[len(said) - len(bad) :]) == bad
        if len(output) < p.min_tokens:
            barred |= token in p.stop_token_ids or (token in EOS and not p.ignore_eos)
        result.append(-math.inf if barred else logit + bias.get(token, 0.0))
    return result


@given(
    changes=PARAMS,
    prompt=st.lists(FEW, min_size=1, max_size=4),
    output=st.lists(FEW, max_size=10),
    seed=st.integers(0, 99),
)
def test_what_is_barred_and_what_is_favoured(
    changes: dict[str, Any], prompt: list[int], output: list[int], seed: int
) -> None:
    p, row = params(**changes), logits_of(seed, vocab=VOCAB)
    wanted = plainly(row.tolist(), p, output)
    shaping = Shaping.of(p, len(prompt), None)
    if shaping is not None:
        shaping.apply(row, [*prompt, *output], EOS)
    assert row.tolist() == pytest.approx(wanted, rel=1e-6)


@given(changes=PARAMS, output=st.lists(FEW, max_size=6), seed=st.integers(0, 9))
def test_nothing_barred_is_ever_drawn_or_the_request_ends(
    changes: dict[str, Any], output: list[int], seed: int
) -> None:
    p = params(seed=seed, presence_penalty=-2.0, repetition_penalty=0.5, logprobs=0, **changes)
    row = logits_of(seed, vocab=VOCAB)
    wanted = plainly(row.tolist(), p, output)
    one, other = history(p, (1, *output)), history(params(seed=seed))
    (result, beside) = sample(torch.stack([row, row]), [one, other], EOS)
    assert isinstance(beside, Sample), "another's row is not harmed"
    if max(wanted) == -math.inf:
        assert isinstance(result, RowError) and result.problem.code is ErrorCode.INVALID_VALUE
        assert "bars" in result.problem.message and f"after {len(output)} of" in str(result.problem)
        return
    assert isinstance(result, Sample) and wanted[result.token] > -math.inf
    assert result.logprobs is not None
    raw = row.log_softmax(-1)[result.token]
    assert result.logprobs.logprob == pytest.approx(float(raw), abs=1e-5), "of the raw logits"


def test_a_bad_word_is_the_outputs_alone() -> None:
    """Not begun in the prompt."""
    p, tokens = params(bad_tokens=((1, 2, 3), (2, 4))), (1, 2)
    for num_prompt, barred in ((2, set()), (1, {4})):
        row, shaping = logits_of(1, vocab=VOCAB), Shaping.of(p, num_prompt, None)
        assert shaping is not None
        shaping.apply(row, tokens, EOS)
        assert set(row.isinf().nonzero().flatten().tolist()) == barred


def test_a_request_without_such_rules_has_none() -> None:
    plain = params(stop_token_ids=(3,), ignore_eos=True, presence_penalty=1.0, top_k=3)
    assert Shaping.of(plain, 1, None) is None


def test_a_bias_is_no_way_round_a_bar() -> None:
    p = params(temperature=0.0, allowed_token_ids=(3, 4), logit_bias=((7, 100.0), (4, 50.0)))
    (result,) = sample(logits_of(1, vocab=VOCAB)[None], [history(p)], EOS)
    assert isinstance(result, Sample) and result.token == 4
