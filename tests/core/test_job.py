"""One attempt: its tokens, when it ends, what its tokenizer hears, and who could never run it."""

import re

import msgspec
import pytest

from core.builders import decode, job_of, prefill, sampling_of, worker_info
from slipstream.core.job import blocks_for, unfit
from slipstream.core.prefix import block_hashes
from slipstream.errors import ErrorCode
from slipstream.messages import Decode
from slipstream.types import FinishReason, TokenLogprobs, pack_tokens

EOS = 63


def test_a_job_knows_what_earlier_attempts_have_made() -> None:
    job = job_of(decode(prompt=[1, 2, 3], accepted=[4, 5], attempt=2), now_s=50.0)
    assert job.tokens == [1, 2, 3, 4, 5]
    assert (job.num_prompt, job.num_accepted, job.num_output) == (3, 2, 2)
    assert (job.key, job.deadline_s, job.handover) == (("r", 2), 150.0, None)
    assert job_of(prefill(target="decode-3")).handover == "decode-3"


@pytest.mark.parametrize(
    ("source", "path"), [(None, "decode-0"), ("prefill-1", "prefill-1>decode-0")]
)
def test_the_path_names_the_workers_that_make_the_tokens(source: str | None, path: str) -> None:
    assert job_of(decode(source=source)).path == path


@pytest.mark.parametrize("num_tokens", [0, 15, 16, 17, 47, 48, 50])
def test_hashes_grow_with_the_tokens(num_tokens: int) -> None:
    job = job_of(decode(prompt=range(40), accepted=range(10)))
    whole = block_hashes(job.tokens, job.space)
    assert job.full_hashes(20) == whole[:1]
    assert job.full_hashes(num_tokens) == whole[: num_tokens // 16], "full blocks only"


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.mark.parametrize(
    ("output", "params", "ends"),
    [
        ([9], {}, None),
        ([9, EOS], {}, (STOP, EOS)),
        ([9, EOS], {"ignore_eos": True}, None),
        ([9, 8], {"stop_token_ids": (7, 8)}, (STOP, 8)),
        ([9, 8], {"stop_token_ids": (8,), "ignore_eos": True}, (STOP, 8)),
        ([EOS], {"min_tokens": 1}, None),
        ([9, EOS], {"min_tokens": 1}, (STOP, EOS)),
        ([9, EOS], {"min_tokens": 9, "ignore_eos": True, "grammar": "g"}, (STOP, EOS)),
        ([9, 8], {"min_tokens": 9, "stop_token_ids": (8,), "grammar": "g"}, None),
        ([9, EOS], {"min_tokens": 2, "max_tokens": 2}, (LENGTH, None)),
        ([9, 9, 9], {"max_tokens": 3}, (LENGTH, None)),
        ([9, 9, EOS], {"max_tokens": 3}, (STOP, EOS)),
        ([9] * 7, {}, (LENGTH, None)),  # 3 + 7 tokens: the context of 10 is full
        ([9] * 6, {}, None),
    ],
)
def test_what_ends_a_stream(
    output: list[int], params: dict[str, object], ends: tuple[FinishReason, int | None] | None
) -> None:
    # The last token is new, those before it were accepted from an earlier attempt: they count.
    job = job_of(decode(accepted=output[:-1], **params))
    job.append(output[-1], None)
    assert job.settle(frozenset({EOS}), max_model_len=10) == (ends is not None)
    assert (job.finish_reason, job.stop_token) == (ends or (None, None))


def test_a_span_counts_positions_from_the_first_output_token_of_all_attempts() -> None:
    job = job_of(decode(prompt=[1, 2], accepted=[3, 4, 5], attempt=2, logprobs=0))
    for token in (6, 7, 8):
        job.append(token, TokenLogprobs(token, -1.0))
    job.cached_tokens = 16
    span = job.span(1)
    assert (span.position, span.tokens) == (4, pack_tokens([7, 8]))
    assert [logprob.token_id for logprob in span.logprobs or []] == [7, 8]
    assert (span.attempt, span.cached_tokens, span.finish_reason) == (2, 16, None)
    job.sampling = sampling_of({})
    assert job.span(0).logprobs is None, "nobody asked for them"


@pytest.mark.parametrize(
    ("message", "code", "says"),
    [
        (decode(prompt=[1] * 30, max_tokens=10), None, ""),
        (decode(prompt=[1] * 30, max_tokens=99), ErrorCode.CONTEXT_LENGTH, "48 .* 30 .* 99 more"),
        (decode(prompt=[1] * 48, max_tokens=1), ErrorCode.CONTEXT_LENGTH, "48 .* 48 .* 1 more"),
        (decode(prompt=[]), ErrorCode.INVALID_VALUE, r"\[0, 64\)"),
        (decode(prompt=[1, 64]), ErrorCode.INVALID_VALUE, r"\[0, 64\)"),
        (decode(prompt=[-1]), ErrorCode.INVALID_VALUE, r"\[0, 64\)"),
        (decode(prompt=[1], accepted=[64]), ErrorCode.INVALID_VALUE, r"\[0, 64\)"),
    ],
)
def test_who_fits_no_worker_learns_both_numbers(
    message: Decode, code: ErrorCode | None, says: str
) -> None:
    problem = unfit(message, worker_info(num_blocks=3))
    assert (problem.code if problem else None) == code
    assert problem is None or re.search(says, problem.message)


def test_the_context_bounds_the_answer_where_the_pool_does_not() -> None:
    message = decode(prompt=[1] * 30, max_tokens=1000)  # it ends at 48 tokens
    assert unfit(message, worker_info(num_blocks=3, max_model_len=48)) is None, (
        "it ends at 48 tokens"
    )
    problem = unfit(message, worker_info(num_blocks=3, max_model_len=30))
    assert problem is not None and "holds 30 tokens" in problem.message


def test_torn_token_ids_fit_nowhere() -> None:
    torn = msgspec.structs.replace(decode(prompt=[1]), accepted=b"abc")
    problem = unfit(torn, worker_info())
    assert problem is not None and problem.code is ErrorCode.INVALID_VALUE


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
