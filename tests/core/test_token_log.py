"""What was said is kept until it was surely heard."""

import pytest

from core.builders import decode, job_of
from slipstream.core.job import Job
from slipstream.core.machine import Send
from slipstream.core.token_log import REPEAT_S, TokenLog
from slipstream.messages import TokensOut
from slipstream.types import FinishReason, unpack_tokens

KEEP_S = 30.0


@pytest.fixture
def log() -> TokenLog:
    return TokenLog(KEEP_S, ended_max=3)


def job_with(*made: int, request_id: str = "r", attempt: int = 1, accepted: int = 0) -> Job:
    message = decode(request_id, [1, 2], attempt=attempt, accepted=[50] * accepted)
    job = job_of(message)
    for token in made:
        job.append(token, None)
    return job


def ended(log: TokenLog, request_id: str = "r", attempt: int = 1, now_s: float = 0.0) -> Job:
    """A job that has said two tokens and its end."""
    job = job_with(7, 8, request_id=request_id, attempt=attempt)
    job.finish_reason = FinishReason.LENGTH
    log.stage(job)
    log.flush()
    log.end(job, now_s)
    return job


def said(log: TokenLog) -> list[tuple[str, int, list[int]]]:
    """(request, position, tokens) of all spans, and nothing is said twice by the next flush."""
    spans = []
    for effect in log.flush():
        assert isinstance(effect, Send) and isinstance(effect.message, TokensOut)
        spans += effect.message.spans
    assert log.flush() == []
    return [(span.request_id, span.position, unpack_tokens(span.tokens)) for span in spans]


def test_one_message_a_step_for_each_tokenizer(log: TokenLog) -> None:
    for request_id, tokenizer in (("a", "tokenizer-0"), ("b", "tokenizer-1"), ("c", "tokenizer-0")):
        job = job_with(7, request_id=request_id)
        job.tokenizer = tokenizer
        log.stage(job)
    first, second = log.flush()
    assert isinstance(first, Send) and isinstance(second, Send)
    assert (first.to, second.to) == ("tokenizer-0", "tokenizer-1")
    assert isinstance(first.message, TokensOut)
    assert [span.request_id for span in first.message.spans] == ["a", "c"]


def test_only_what_is_new_goes_out(log: TokenLog) -> None:
    job = job_with(7, 8, accepted=3)
    log.stage(job)
    assert said(log) == [("r", 3, [7, 8])]
    job.append(9, None)
    log.stage(job)
    assert said(log) == [("r", 5, [9])]


@pytest.mark.parametrize(
    ("position", "again"),
    [
        (0, [("r", 3, [7, 8, 9])]),  # what was accepted before this attempt, its tokenizer has
        (4, [("r", 4, [8, 9])]),
        (5, []),
        (99, []),
    ],
)
def test_a_running_stream_repeats_what_it_has_said(
    log: TokenLog, position: int, again: list[tuple[str, int, list[int]]]
) -> None:
    job = job_with(7, 8, accepted=3)
    log.stage(job)
    log.flush()
    job.append(9, None)  # made, and goes along
    log.repeat(job, position)
    assert said(log) == again
    assert job.sent == (3 if again else 2)


def test_an_end_is_repeated_even_where_no_token_is_missing(log: TokenLog) -> None:
    job = ended(log)
    log.repeat(job, 2)
    assert said(log) == [("r", 2, [])]


def test_an_end_is_said_again_until_it_is_heard(log: TokenLog) -> None:
    ended(log)
    times = []
    for tick in range(1, 13):
        log.tick(tick * 0.5)
        times += [tick * 0.5] * len(said(log))
    assert times == [REPEAT_S, 2 * REPEAT_S, 3 * REPEAT_S]
    log.acknowledge("r", 1)
    assert log.tick(100.0) == [] and said(log) == [] and not log.ended


@pytest.mark.parametrize(("heard", "kept"), [(1, True), (2, False), (3, False)])
def test_an_answer_counts_for_its_attempt_and_older_ones(
    log: TokenLog, heard: int, kept: bool
) -> None:
    ended(log, attempt=2)
    log.acknowledge("r", heard)
    assert bool(log.ended) == kept


def test_what_nobody_hears_is_given_up_in_the_end(log: TokenLog) -> None:
    job = ended(log, now_s=5.0)
    assert log.tick(5.0 + KEEP_S - 0.1) == []
    assert log.tick(5.0 + KEEP_S) == [job]


def test_of_too_many_the_oldest_are_given_up(log: TokenLog) -> None:
    jobs = [ended(log, request_id=f"r{number}") for number in range(5)]
    assert log.tick(0.1) == jobs[:2]
