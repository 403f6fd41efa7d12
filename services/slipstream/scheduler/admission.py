"""Why a request is not taken."""

import math
from typing import NamedTuple

from slipstream.core.job import blocks_for
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Submit
from slipstream.scheduler.fleet import Fleet
from slipstream.scheduler.lane import RETRY_AFTER_MAX_S, Lane
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.types import TOKEN_BYTES, count_tokens

NO_WORKER_RETRY_S = 5.0
TIMES_ALONE = 2.0
"""A prompt that takes long by itself may wait as long again, whatever the target: else long ones
would be refused as long as anybody is served."""


def refusal(
    submit: Submit,
    fleet: Fleet,
    settings: SchedulerSettings,
    lane: Lane,
    now_s: float,
    *,
    live: int,
    draining: bool,
) -> Problem | None:
    """None if the request is taken. What has begun elsewhere is, however full it is here."""
    if len(submit.prompt) % TOKEN_BYTES or len(submit.accepted) % TOKEN_BYTES or not submit.prompt:
        text = f"A prompt is one token id or more, of {TOKEN_BYTES} bytes each."
        return Problem(code=ErrorCode.INVALID_VALUE, message=text, param="prompt")
    begun = submit.repeated or submit.accepted
    if draining and not begun:
        return Problem(code=ErrorCode.DRAINING, message="The server is stopping.")
    if live >= settings.max_requests and not begun:
        return Problem(
            code=ErrorCode.QUEUE_FULL,
            message=f"{live} requests are live, the limit is {settings.max_requests} "
            "(--max-requests). Try again later.",
            retry_after_s=lane.pace.retry_after_s(now_s),
        )
    waiting, max_tokens = lane.queue.num_tokens, settings.max_queued_tokens
    if waiting and waiting + count_tokens(submit.prompt) > max_tokens and not begun:
        return Problem(
            code=ErrorCode.QUEUE_FULL,
            message=f"Prompts of {waiting} tokens wait, the limit is {max_tokens} "
            "(--max-queued-tokens). Try again later.",
            retry_after_s=lane.pace.retry_after_s(now_s),
        )
    needed = blocks_for(count_tokens(submit.prompt) + submit.sampling.max_tokens)
    most = fleet.largest_pool_blocks(submit.model)
    if 0 < most < needed and not begun:  # that waits for a worker that held it
        return Problem(
            code=ErrorCode.CONTEXT_LENGTH,
            message=f"Prompt and answer need {needed} KV blocks; the largest worker has {most} "
            "(--kv-cache-bytes). Shorten the prompt or max_tokens.",
        )
    return None


def no_worker(missing: str) -> Problem:
    text = f"There is {missing} for a while now. Send the request again."
    return Problem(code=ErrorCode.NO_WORKER, message=text, retry_after_s=NO_WORKER_RETRY_S)


class Expected(NamedTuple):
    """The time to a request's first token, in seconds."""

    waited_s: float
    """Since its submission."""
    ahead_s: float
    """From now on."""
    alone_s: float = 0.0
    """If there was nothing else to do."""


def too_late(expected: Expected, target_s: float) -> Problem | None:
    """None if a request on which no work was done may still wait, or begin."""
    first_s = expected.waited_s + expected.ahead_s
    limit_s = max(target_s, TIMES_ALONE * expected.alone_s)
    if first_s <= limit_s:
        return None
    wait_s = min(RETRY_AFTER_MAX_S, max(1.0, first_s - limit_s))
    return Problem(
        code=ErrorCode.QUEUE_FULL,
        message=f"The workers are busy: the first token is expected {first_s:.1f} s after the "
        f"request, the limit is {limit_s:.1f} s (--ttft-target-s). Try again in "
        f"{math.ceil(wait_s)} s.",
        retry_after_s=wait_s,
    )
