"""The pure parts of load tests: arrivals, plan, prompts, streams, comparison, numbers, plots."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.loadtest.load.answers import Answers
from slipstream.loadtest.load.asks import Asks
from slipstream.loadtest.load.numbers import groups_by_phase, series_of, token_events
from slipstream.loadtest.load.plan import Plan, Span
from slipstream.loadtest.load.report import Client, checks_of, report_of
from slipstream.loadtest.load.run import capacity_rps
from slipstream.loadtest.load.sample import Sample
from slipstream.loadtest.load.scenarios import (
    CAPACITY,
    SCENARIOS,
    WARM_UP,
    Mix,
    Phase,
    arrivals,
    phases,
)
from slipstream.loadtest.load.settings import Settings
from slipstream.loadtest.load.stream import Stream
from slipstream.loadtest.load.svg import TICKS, Line, plot, tick_step
from slipstream.loadtest.load.svg import Span as svg_span

CALM = Client(cpu_share=0.1, not_sent=0, crashes=0, compared=0, interrupted=False)


def sample(sent_s: float, ttft_s: float, phase: str = "users", **changes: object) -> Sample:
    """Four pieces of two tokens, 0.1 s apart."""
    fields: dict[str, object] = {
        "prompt": "p",
        "kind": "usual",
        "attempt": 0,
        "planned_s": sent_s,
        "end_s": sent_s + ttft_s + 0.3,
        "times_s": [sent_s + ttft_s + 0.1 * n for n in range(4)],
        "outcome": "right",
        "tokens": 8,
        **changes,
    }
    return Sample(phase=phase, sent_s=sent_s, **fields)  # type: ignore[arg-type]


# --- Arrivals and plan ----------------------------------------------------------------------------


def test_arrivals_have_the_rate_of_their_phase() -> None:
    part = [
        Phase(name="a", duration_s=400, load=0.5),
        Phase(name="b", duration_s=100, load=4),
        Phase(name="c", duration_s=100),
    ]
    times_s = list(arrivals(part, 5.0, seed=1))
    assert times_s == sorted(times_s) == list(arrivals(part, 5.0, seed=1))
    assert times_s != list(arrivals(part, 5.0, seed=2))
    counts = [sum(a <= t < b for t in times_s) for a, b in ((0, 400), (400, 500), (500, 600))]
    assert counts[0] == pytest.approx(1000, rel=0.1) and counts[1] == pytest.approx(2000, rel=0.1)
    assert counts[2] == 0
    # By chance, not in step: of a Poisson process, gaps vary as much as they are long.
    gaps_s = [b - a for a, b in pairwise(t for t in times_s if t < 400)]
    assert statistics.stdev(gaps_s) == pytest.approx(statistics.mean(gaps_s), rel=0.2)


def test_a_part_begins_when_the_one_before_is_answered() -> None:
    one, two = Phase(name="one", duration_s=2, users=1), Phase(name="two", duration_s=1, users=1)
    plan = Plan([[one], [two]], drain_s=5)
    plan.advance(10.0, 0)
    assert plan.asks(11.9) and not plan.asks(12.0) and plan.begin_s == 10
    plan.advance(11.0, 0)
    plan.advance(12.5, 3)
    assert plan.part == [one] and plan.phase_name(12.6) == "one"
    plan.advance(13.0, 0)
    assert plan.part == [two] and plan.spans == [Span(one, 10, 12), Span(two, 13, 14)]
    plan.advance(18.9, 1)
    assert not plan.over
    plan.advance(19.0, 1)
    assert plan.over and not plan.asks(13.5)


@pytest.mark.parametrize("name", SCENARIOS)
def test_capacity_is_measured_where_rates_matter(name: str) -> None:
    scenario = SCENARIOS[name]
    measured = [part[0].name for part in phases(scenario, Settings())]
    given = [part[0].name for part in phases(scenario, Settings(capacity_rps=5, warm_up_s=0))]
    own = scenario.phases(Settings())
    assert measured[0] == WARM_UP and (CAPACITY in measured) == bool(own[0].load)
    assert given == [own[0].name]
    names = [phase.name for part in phases(scenario, Settings()) for phase in part]
    assert len(names) == len(set(names)) and scenario.overload in ("", *names)


def test_capacity_is_that_of_the_best_half() -> None:
    """A request every 2 s, of 8 tokens; in the second half of the measurement one each second."""
    span = Span(Phase(name=CAPACITY, duration_s=20, users=1), 0, 20)
    samples = [sample(at_s, 0.1) for at_s in (0, 2, 4, 6, 8, *range(10, 20))]
    assert capacity_rps([span], samples, output_tokens=8) == pytest.approx(1.0)
    assert capacity_rps([span], samples, output_tokens=4) == pytest.approx(2.0)


# --- Prompts --------------------------------------------------------------------------------------


def test_prompts_are_the_seeds_and_repeat() -> None:
    asks = Asks(Settings(repeat_share=0.5), Mix(long=0.3, cancelled=0.2))
    drawn = [asks.first(number) for number in range(300)]
    assert drawn == [
        Asks(Settings(repeat_share=0.5), Mix(long=0.3, cancelled=0.2)).first(n) for n in range(300)
    ]
    by_name: dict[str, list[dict[str, str]]] = {}
    for ask in drawn:
        assert by_name.setdefault(ask.name, ask.messages) == ask.messages
    texts = {str(messages) for messages in by_name.values()}
    assert len(texts) == len(by_name) < 200
    assert {ask.kind for ask in drawn} == {"usual", "long", "cancelled"}
    assert all(bool(ask.leave_after) == (ask.kind == "cancelled") for ask in drawn)
    lengths = {len(ask.messages[0]["content"].split()) for ask in drawn}
    assert min(lengths) < 110 < 900 < max(lengths)
    assert Asks(Settings(seed=1), Mix()).first(0).messages != drawn[0].messages


def test_a_conversation_goes_on_with_the_answer() -> None:
    asks = Asks(Settings(turns=3), Mix(turns=3, shared_prompt=True))
    first = asks.first(0)
    second = asks.next(first, "said")
    assert second is not None
    assert second.messages[:3] == [*first.messages, {"role": "assistant", "content": "said"}]
    third = asks.next(second, "more")
    assert third is not None and third.name == f"{first.name}, turn 3"
    assert asks.next(third, "end") is None


# --- Streams --------------------------------------------------------------------------------------

PIECE = b'data: {"choices":[{"delta":{"content":"\xc3\xa4b"}}]}\n\n'
END = b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"


@settings(deadline=None)
@given(st.integers(1, 60))
def test_a_stream_cut_anywhere(piece: int) -> None:
    data = b": comment\n\n" + PIECE + PIECE.replace(b"\n", b"\r\n") + PIECE + END + USAGE + DONE
    stream = Stream()
    for begin in range(0, len(data), piece):
        stream.feed(data[begin : begin + piece], float(begin))
    stream.close()
    assert stream.text == "äb" * 3 and len(stream.times_s) == 3
    assert (stream.prompt_tokens, stream.tokens, stream.cached_tokens) == (9, 3, 4)
    assert stream.broken(3) is None


@pytest.mark.parametrize(
    ("data", "wrong", "told"),
    [
        (PIECE * 3, False, "without finish_reason"),
        (PIECE * 3 + END + USAGE, False, "without [DONE]"),
        (PIECE * 3 + END + DONE, True, "0 tokens"),
        (PIECE * 4 + END + USAGE + DONE, True, "4 pieces of text, but 3 tokens"),
        (PIECE + b'data: {"error":{"message":"lost it"}}\n\n', False, "lost it"),
        (PIECE + b"data: {nonsense\n\n", True, "cannot be read: {nonsense"),
        (END + USAGE + DONE + PIECE, True, "after [DONE]"),
        (b"data: " + b"x" * (1 << 20), True, "an event of more than"),
    ],
)
def test_a_broken_stream(data: bytes, wrong: bool, told: str) -> None:
    stream = Stream()
    stream.feed(data, 1.0)
    broken = stream.broken(3)
    assert broken is not None and broken.wrong == wrong and told in broken.told


def test_answers_are_held_against_each_other() -> None:
    answers = Answers(limit=2)
    assert not answers.differs(b"p", "one t", whole=False)
    assert not answers.differs(b"p", "one two", whole=True)
    assert not answers.differs(b"p", "one", whole=False)
    assert "from character 4 on: 'x', earlier 'two'" in answers.differs(b"p", "one x", whole=False)
    assert answers.differs(b"p", "one two three", whole=True)
    assert answers.differs(b"p", "one two three", whole=False)
    assert answers.differs(b"p", "one", whole=True)
    assert answers.compared == 6
    assert not answers.differs(b"q", "a", whole=True)
    assert not answers.differs(b"r", "a", whole=True) and not answers.differs(b"r", "b", whole=True)


# --- Numbers --------------------------------------------------------------------------------------


def test_numbers_of_a_phase() -> None:
    span = Span(Phase(name="users", duration_s=10, users=1), 0, 10)
    refused = sample(4, 0, outcome="refused", times_s=[], tokens=0, end_s=4.05)
    samples = [sample(second, 0.5) for second in range(5)] + [sample(5, 3.0), refused]
    samples.append(sample(6, 0.5, outcome="lost", kind="slow"))
    (group,) = groups_by_phase([span], samples, target_s=1.0)
    assert (group.accepted, group.refused, group.failed, group.in_time) == (7, 1, 1, 5)
    assert group.goodput_per_s == 0.5 and group.tokens_per_s == pytest.approx(5.6)
    assert group.ttft_s.p50 == 0.5 and group.ttft_s.p99 == pytest.approx(2.85)
    assert group.itl_s.count == 18 and group.itl_s.p95 == pytest.approx(0.1)
    assert group.refusal_s.p99 == pytest.approx(0.05)


def test_series_lose_nothing() -> None:
    samples = [sample(second * 0.37, 0.5) for second in range(50)]
    elapsed_s = max(one.end_s for one in samples)
    series = series_of(samples, elapsed_s)
    assert sum(series.sent_per_s) * series.bin_s == pytest.approx(50)
    assert sum(series.tokens_per_s) * series.bin_s == pytest.approx(token_events(samples)[1].sum())
    busy_s = sum(one.end_s - one.sent_s for one in samples)
    assert sum(series.in_flight) * series.bin_s == pytest.approx(busy_s)
    assert all(value is None or value == pytest.approx(0.5) for value in series.ttft_p95_s)


def failed_checks(samples: list[Sample], client: Client = CALM, **changes: object) -> set[str]:
    chosen = Settings(scenario="step", **changes)  # type: ignore[arg-type]
    spans = [
        Span(Phase(name=n, duration_s=5), 5.0 * i, 5.0 * i + 5)
        for i, n in enumerate(("before", "step"))
    ]
    groups = groups_by_phase(spans, samples, chosen.ttft_target_s)
    checks = checks_of(chosen, SCENARIOS["step"], groups, samples, samples, client)
    return {check.name for check in checks if not check.ok}


def test_verdicts() -> None:
    refused = sample(6, 0, "step", outcome="refused", times_s=[], end_s=6.5)
    fine = [*(sample(n, 0.5, "before") for n in range(4)), sample(6, 0.5, "step"), refused]
    assert not failed_checks(fine)
    assert failed_checks(fine, ttft_target_s=0.4) == {"p99 TTFT"}
    assert not failed_checks([*fine, sample(7, 9.0, "step", kind="long")])
    assert failed_checks(fine[:-1]) == {"429, Retry-After"}
    assert failed_checks([]) == {"p99 TTFT", "429, Retry-After"}
    assert failed_checks(fine, goodput_share=0.2) == set()
    assert failed_checks(fine, goodput_share=0.9) == {"goodput in step"}
    assert failed_checks(fine, refusal_target_s=0.1) == {"p99 of refusals"}
    for outcome in ("lost", "wrong", "error"):
        assert failed_checks([*fine, sample(7, 0.1, "step", outcome=outcome)]) == {outcome}
    for harm in ({"not_sent": 1}, {"crashes": 1}, {"interrupted": True}):
        fields = {name: getattr(CALM, name) for name in Client.__struct_fields__}
        assert failed_checks(fine, Client(**{**fields, **harm})) == {"client"}


def test_warm_up_is_not_judged_by_time_but_its_answers_are() -> None:
    spans = [
        Span(Phase(name=WARM_UP, duration_s=5, users=1, judged=False), 0, 5),
        Span(Phase(name="users", duration_s=5, users=1), 5, 10),
    ]
    samples = [sample(1, 9.0, WARM_UP), sample(2, 0.5, WARM_UP, outcome="wrong"), sample(6, 0.5)]
    report = report_of(
        Settings(scenario="multi-turn"),
        SCENARIOS["multi-turn"],
        spans,
        samples,
        CALM,
        elapsed_s=12.0,
        capacity_rps=0.0,
        date="",
        url="",
        model="",
    )
    assert {check.name for check in report.checks if not check.ok} == {"wrong"}
    assert not report.ok and [one.phase for one in report.failures] == [WARM_UP]


# --- Plots ----------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e9))
def test_ticks_reach_the_highest_value(highest: float) -> None:
    step = tick_step(highest)
    assert highest <= step * TICKS * (1 + 1e-6) and step <= highest


def test_a_plot_keeps_gaps_and_shows_lone_values() -> None:
    spans = [svg_span("fits", 0, 5), svg_span("too narrow", 5, 5.5)]
    svg = plot("<a>", [Line("x", [1.0, 2.0, None, 3.0, None, None])], 1.0, spans, target=4.0)
    assert "fits" in svg and "narrow" not in svg and svg.count('"phase" d=') == 2
    assert svg.count('class="c0" d="M') == 2  # one of them in the legend
    assert svg.count("<circle") == 1 and 'class="target"' in svg
    assert "&lt;a&gt;" in svg and "<a>" not in svg
