"""Prices follow what workers measure."""

import random

import pytest

from slipstream.core.step_model import Prompt, StepModel, prefill_pairs
from slipstream.messages import StepSample, TransferSample
from slipstream.scheduler.prices import FADE_S, TYPICAL_TRANSFER, StepPrices, TransferPrices

TRUE = StepModel(
    base_s=8e-3,
    prefill_token_s=1.2e-4,
    prefill_pair_s=6e-9,
    decode_row_s=3e-4,
    decode_context_s=4e-7,
)


def shape(rng: random.Random, prefill: bool) -> StepSample:
    if not prefill:
        rows = rng.randrange(1, 32)
        return StepSample(0, 0, rows, rows * rng.randrange(100, 2000), 0.0)
    tokens, cached = rng.choice((64, 200, 512)), rng.randrange(0, 4000)
    rows = rng.randrange(0, 8)
    return StepSample(tokens, prefill_pairs(cached, tokens), rows, rows * 500, 0.0)


def measured(
    rng: random.Random, count: int, slower: float = 1.0, prefills: float = 0.4
) -> list[StepSample]:
    samples = []
    for _ in range(count):
        step = shape(rng, rng.random() < prefills)
        elapsed_s = TRUE.step_s(step) * slower * rng.lognormvariate(0.0, 0.1)
        samples.append(
            StepSample(
                step.prefill_tokens,
                step.prefill_pairs,
                step.decode_rows,
                step.decode_context,
                elapsed_s,
            )
        )
    return samples


def error(prices: StepPrices, rng: random.Random, slower: float = 1.0) -> float:
    """Median relative error over drawn steps."""
    model = StepModel(*prices.terms)
    errors = []
    for _ in range(200):
        step = shape(rng, rng.random() < 0.5)
        true_s = TRUE.step_s(step) * slower
        errors.append(abs(model.step_s(step) - true_s) / true_s)
    return sorted(errors)[100]


@pytest.mark.parametrize("seed", range(5))
def test_a_few_reports_are_enough(seed: int) -> None:
    rng = random.Random(seed)
    prices = StepPrices()
    assert error(prices, rng) > 0.3
    for _ in range(6):
        prices.learn(measured(rng, 16), 0.0)
    assert error(prices, rng) < 0.1


@pytest.mark.parametrize("slower", [3.0, 0.25, 20.0])
def test_a_worker_that_changes_its_pace_is_believed_in_two_reports(slower: float) -> None:
    rng = random.Random(1)
    prices = StepPrices()
    for _ in range(20):
        prices.learn(measured(rng, 16), 0.0)
    for _ in range(2):
        prices.learn(measured(rng, 16, slower, prefills=0.0), 0.0)
    assert error(prices, rng, slower) < 0.2, "also for prompts, which it has not computed since"


def test_one_odd_report_is_noise() -> None:
    rng = random.Random(2)
    prices = StepPrices()
    for _ in range(20):
        prices.learn(measured(rng, 16), 0.0)
    prices.learn(measured(rng, 4, 10.0), 0.0)
    prices.learn(measured(rng, 16), 0.0)
    assert error(prices, rng) < 0.3


def test_decoding_does_not_make_prompts_forgotten() -> None:
    rng = random.Random(3)
    prices = StepPrices()
    for _ in range(20):
        prices.learn(measured(rng, 16), 0.0)
    before = prices.prompt_s(Prompt.of(1000, 500))
    for _ in range(200):
        prices.learn(measured(rng, 16, prefills=0.0), 0.0)
    assert prices.prompt_s(Prompt.of(1000, 500)) == pytest.approx(before, rel=0.1)


def test_a_newcomer_is_taken_for_the_best_of_those_that_are_known() -> None:
    rng = random.Random(4)
    good, bad = StepPrices(), StepPrices()
    for _ in range(20):
        good.learn(measured(rng, 16), 0.0)
        bad.learn(measured(rng, 16, slower=10.0), 0.0)
    assert StepPrices([good]).terms == StepPrices([good, bad, StepPrices()]).terms == good.terms
    assert StepPrices([StepPrices()]).terms == StepPrices().terms


def test_a_newcomer_whose_first_steps_were_slow_is_tried_again() -> None:
    """It had to compile; with so few samples nothing of its own is known to be better."""
    rng = random.Random(4)
    known = StepPrices()
    for _ in range(20):
        known.learn(measured(rng, 16), 0.0)
    prices = StepPrices([known])
    prices.learn(measured(rng, 2, slower=20.0), 0.0)
    assert prices.step_s(8, 4096) > 5 * known.step_s(8, 4096)
    for times in range(1, 8):
        prices.fade(times * FADE_S)
    assert prices.step_s(8, 4096) < 1.3 * known.step_s(8, 4096)


@pytest.mark.parametrize("elapsed_s", [0.0, -1.0])
def test_what_cannot_be_is_not_learnt(elapsed_s: float) -> None:
    prices = StepPrices()
    before = prices.terms
    prices.learn([StepSample(0, 0, 1, 10, elapsed_s)] * 4, 0.0)
    assert prices.terms == before


def test_prices_stay_positive_whatever_is_said() -> None:
    rng = random.Random(5)
    prices = StepPrices()
    for _ in range(300):
        step = shape(rng, rng.random() < 0.5)
        nonsense = StepSample(
            *(step.prefill_tokens, step.prefill_pairs, step.decode_rows, step.decode_context),
            rng.choice((1e-7, 1e-3, 5.0, 1e4)),
        )
        prices.learn([nonsense] * rng.randrange(1, 4), 0.0)
        assert all(0.0 < term < 1e9 for term in prices.terms), prices.terms


def test_transfers_are_priced_by_the_transport_that_serves_the_pair() -> None:
    transfers = TransferPrices()
    assert transfers.read_s("a", "b", 10) == pytest.approx(
        TYPICAL_TRANSFER[0] + 10 * TYPICAL_TRANSFER[1]
    )
    transfers.sync("abc")
    for _ in range(20):
        for count in (1, 8, 64):
            quick, slow = 1e-3 + 2e-5 * count, 4e-3 + 2e-3 * count
            both = [
                TransferSample("b", "shm", count, quick),
                TransferSample("c", "bus", count, slow),
            ]
            transfers.learn("a", both, 0.0)
    assert transfers.read_s("a", "b", 30) == pytest.approx(1.6e-3, rel=0.2)
    assert transfers.read_s("a", "c", 30) == pytest.approx(64e-3, rel=0.2)
    transfers.sync("ab")
    assert transfers.read_s("a", "c", 30) < 64e-3 / 2, "a new life may have another transport"
    assert transfers.read_s("a", "b", 30) == pytest.approx(1.6e-3, rel=0.2)
    transfers.learn("a", [TransferSample("c", "bus", 30, 64e-3)] * 9, 0.0)
    transfers.sync("abc")
    assert transfers.read_s("a", "c", 30) < 64e-3 / 2, "told after it had gone"


def test_a_way_that_was_slow_once_is_tried_again() -> None:
    transfers = TransferPrices()
    transfers.sync("ab")
    transfers.learn("a", [TransferSample("b", "shm", 30, 9.0)], 100.0)
    at = []
    for age in range(301):
        transfers.fade(100.0 + age)
        at.append(transfers.read_s("a", "b", 30))
    assert at[0] == at[29] == pytest.approx(9.0, rel=0.1), "what is fresh does not fade"
    assert at[0] / 9 < at[90] < at[0] / 2 and at[300] < at[0] / 200
    assert transfers.read_s("a", "c", 30) < 9.0 / 200, "nor the best that is known"
    transfers.learn("a", [TransferSample("b", "shm", 30, 2e-3)], 400.0)
    assert transfers.read_s("a", "b", 30) == pytest.approx(2e-3, rel=0.1)


def test_a_quick_way_stays_quick_while_nobody_uses_it() -> None:
    transfers = TransferPrices()
    transfers.sync("ab")
    transfers.learn("a", [TransferSample("b", "shm", 30, 1e-4)] * 9, 0.0)
    before_s = transfers.read_s("a", "b", 30)
    for times in range(9):
        transfers.fade(900.0 + 2 * FADE_S * times)
    assert transfers.read_s("a", "b", 30) == before_s


def test_a_worker_that_was_slow_and_is_not_used_is_tried_again() -> None:
    rng = random.Random(6)
    prices = StepPrices()
    for _ in range(20):
        prices.learn(measured(rng, 16), 0.0)
    usual_s, decode_s = prices.prompt_s(Prompt.of(0, 512)), prices.step_s(8, 4096)
    for _ in range(20):
        prices.learn(measured(rng, 16, slower=4.0), 10.0)
    slow_s, slow_decode_s = prices.prompt_s(Prompt.of(0, 512)), prices.step_s(8, 4096)
    assert slow_s > 3 * usual_s and slow_decode_s > 3 * decode_s
    for second in range(11, 200):
        if second < 10 + FADE_S:
            assert prices.prompt_s(Prompt.of(0, 512)) > 0.9 * slow_s, "what is fresh does not fade"
        prices.learn(measured(rng, 4, slower=4.0, prefills=0.0), float(second))
        prices.fade(float(second))
    assert usual_s * 0.9 < prices.prompt_s(Prompt.of(0, 512)) < usual_s * 1.3, (
        "no prompt for minutes"
    )
    assert prices.step_s(8, 4096) == pytest.approx(slow_decode_s, rel=0.1), "it decodes, slowly"
    for _ in range(4):
        prices.learn(measured(rng, 16, slower=4.0), 200.0)
    assert prices.prompt_s(Prompt.of(0, 512)) == pytest.approx(slow_s, rel=0.15), "it is still slow"


def test_what_nobody_has_measured_does_not_fade() -> None:
    prices = StepPrices()
    prices.learn([StepSample(0, 0, 1, 10, 1.0)], 0.0)
    before = prices.terms
    prices.fade(1000.0)
    assert prices.terms == before


def test_an_odd_report_is_noise_after_a_fade_too() -> None:
    rng = random.Random(8)
    prices = StepPrices()
    for slower in (1.0, 3.0):
        for _ in range(20):
            prices.learn(measured(rng, 16, slower), 0.0)
    for _ in range(20):
        prices.learn(measured(rng, 16, 3.0, prefills=1.0), FADE_S)
    prices.fade(FADE_S)  # of decoding, which it does not do any more
    prompt_s = prices.prompt_s(Prompt.of(0, 512))
    prices.learn(measured(rng, 2, 30.0, prefills=1.0), FADE_S + 1)
    assert prices.prompt_s(Prompt.of(0, 512)) == pytest.approx(prompt_s, rel=0.1)
    prices.learn(measured(rng, 16, 3.0, prefills=1.0), FADE_S + 2)
    assert prices.prompt_s(Prompt.of(0, 512)) == pytest.approx(prompt_s, rel=0.1)
