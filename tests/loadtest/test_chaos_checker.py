"""What the checker of chaos says of histories in which something is wrong."""

from typing import Any

import pytest

from slipstream.loadtest.chaos.checker import BROKEN, LATE_S, check, deliveries, pause
from slipstream.loadtest.chaos.history import Choice, Entry, Facts
from slipstream.loadtest.chaos.soak import Weight, goodput, grown

TEXT = "the sea is wide and the ships on it are small"
TOKENS = 12


def answer(text: str = TEXT, **changes: Any) -> Entry:
    """A right and whole one, unless something is changed."""
    whole: dict[str, Any] = {
        "ask": "sea",
        "timeout_s": 10.0,
        "sent_s": 100.0,
        "end_s": 104.0,
        "times_s": [101.0, 101.1, 103.6, 103.7],
        "status": 200,
        "done": True,
        "choices": {0: Choice(text, "length", [-0.5, -0.25])},
        "prompt_tokens": 3,
        "completion_tokens": TOKENS,
    }
    return Entry(**{**whole, **changes})


def problems(entry: Entry, may: tuple[str, ...] = (), facts: Facts | None = None) -> list[str]:
    return check([entry], {"sea": answer()}, may, facts or Facts(), None).problems


def test_a_right_answer_is_none() -> None:
    found = check([answer()] * 3, {"sea": answer()}, (), Facts(), 102.0)
    assert (found.requests, found.failed, found.wrong, found.problems) == (3, 0, 0, [])
    assert found.pauses_s == [2.5] * 3
    (short_s,) = check([answer()], {"sea": answer()}, (), Facts(), 103.65).pauses_s
    assert short_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TEXT.replace("wide and ", ""), "lost at character 11"),
        (TEXT.replace("the ships", "the ships the ships"), "said twice at character"),
        (TEXT.replace("wide", "WIDE"), "wrong at character 11"),
        (TEXT[:20], "cut off at character 20"),
    ],
)
def test_where_an_answer_parts_from_the_right_one(text: str, told: str) -> None:
    entry = answer(text)
    found = check([entry], {"sea": answer()}, (), Facts(), None)
    assert found.wrong == 1
    assert told in found.problems[0]


def test_what_an_answer_that_failed_has_said_must_be_right() -> None:
    def cut(text: str) -> Entry:
        return answer(done=False, broken="reset", choices={0: Choice(text)})

    assert not problems(cut(TEXT[:9]), (BROKEN,))
    assert problems(cut(TEXT[:9])) == ["sea (): broken: reset"]
    assert "wrong at" in problems(cut("the lake"), (BROKEN,))[0]


def test_log_probabilities_and_endings() -> None:
    assert problems(answer(choices={0: Choice(TEXT, "stop", [-0.5, -0.25])}))
    assert problems(answer(choices={0: Choice(TEXT, "length", [-0.5, -0.26])}))
    assert problems(answer(choices={0: Choice(TEXT, "length", [-0.5])}))
    assert problems(answer(choices={}))


def test_usage_is_held_against_the_right_answers() -> None:
    (told,) = problems(answer(completion_tokens=TOKENS + 1))
    assert "usage" in told
    (told,) = problems(answer(prompt_tokens=2))
    assert "usage" in told


def test_a_request_without_an_end() -> None:
    assert "has no end" in problems(answer(done=False, choices={}))[0]
    assert "without a finish_reason" in problems(answer(choices={0: Choice(TEXT[:5])}))[0]
    (told,) = problems(answer(end_s=100 + 10 + LATE_S + 1))
    assert "after its time budget" in told


def test_errors_are_allowed_by_name() -> None:
    late = answer(code="deadline_exceeded", done=True, choices={})
    assert not problems(late, ("deadline_exceeded",))
    assert problems(late, ("internal_error",)) == ["sea (): failed: deadline_exceeded"]
    assert check([late], {"sea": answer()}, ("deadline_exceeded",), Facts(), None).failed == 1
    assert not problems(answer(left=True, done=False, choices={0: Choice(TEXT[:3])}))


def test_what_is_left_behind() -> None:
    facts = Facts(stranded=2, unsettled=["decode-0: running"], leaked=["5 segments of 4 workers"])
    assert problems(answer(), facts=facts) == [
        "2 blocks stranded",
        "decode-0: running",
        "5 segments of 4 workers",
    ]


def test_only_streams_that_ran_have_a_pause() -> None:
    assert pause(answer(), 100.5) is None
    assert pause(answer(times_s=[]), None) is None
    assert pause(answer(), None) == 2.5


def test_deliveries_are_without_a_gap_and_end_once() -> None:
    def said(position: int, tokens: int, end: str | None = None) -> tuple[float, str, Any]:
        item = {"position": position, "tokens": bytes(4 * tokens), "finish_reason": end}
        return (0.0, "Deliver", {"request_id": "r", "item": item})

    prompt = (0.0, "Deliver", {"request_id": "r", "item": 7})
    assert not deliveries([prompt, said(0, 1), said(1, 2), said(3, 1, "stop")])
    assert deliveries([said(0, 1), said(2, 1)]) == ["r: position 2 after 1"]
    assert deliveries([said(0, 2), said(1, 1)]) == ["r: position 1 after 2"]
    assert deliveries([said(0, 1, "stop"), said(1, 1)]) == ["r: something after its end"]


def test_what_a_soak_may_have_more_of() -> None:
    before = {"frontend-0": Weight(100 << 20, 50, 8)}
    assert not grown(before, {"frontend-0": Weight(120 << 20, 53, 8)})
    assert grown(before, {"frontend-0": Weight(140 << 20, 50, 8)})
    assert grown(before, {"frontend-0": Weight(100 << 20, 90, 8)})
    assert grown(before, {"frontend-0": Weight(100 << 20, 50, 80)})


def test_goodput_counts_whole_answers() -> None:
    entries = [answer(), answer(sent_s=102.0, end_s=106.0), answer(done=False, broken="reset")]
    assert goodput(entries) == pytest.approx(2 * TOKENS / 6)
    assert goodput([]) == 0.0
