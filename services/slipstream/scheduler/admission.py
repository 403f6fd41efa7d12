"""Why a request is not taken."""

from slipstream.core.job import blocks_for
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Submit
from slipstream.scheduler.fleet import Fleet
from slipstream.types import TOKEN_BYTES, count_tokens


def refusal(
    submit: Submit, fleet: Fleet, *, live: int, max_requests: int, draining: bool
) -> Problem | None:
    """None if the request is taken. What has begun elsewhere is, however full it is here."""
    if len(submit.prompt) % TOKEN_BYTES or len(submit.accepted) % TOKEN_BYTES or not submit.prompt:
        text = f"A prompt is one token id or more, of {TOKEN_BYTES} bytes each."
        return Problem(code=ErrorCode.INVALID_VALUE, message=text, param="prompt")
    begun = submit.repeated or submit.accepted
    if draining and not begun:
        return Problem(code=ErrorCode.DRAINING, message="The server is stopping.")
    if live >= max_requests and not begun:
        return Problem(
            code=ErrorCode.QUEUE_FULL,
            message=f"{live} requests are live, the limit is {max_requests} (--max-requests). "
            "Try again later.",
        )
    needed = blocks_for(count_tokens(submit.prompt) + submit.sampling.max_tokens)
    most = fleet.largest_pool_blocks()
    if 0 < most < needed:
        return Problem(
            code=ErrorCode.CONTEXT_LENGTH,
            message=f"Prompt and answer need {needed} KV blocks; the largest worker has {most} "
            "(--kv-cache-bytes). Shorten the prompt or max_tokens.",
        )
    return None
