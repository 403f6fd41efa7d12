"""Whether a request fits: its tokens the vocabulary, its length the context."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from slipstream.errors import ErrorCode, Problem
from slipstream.messages import ChatPrompt, NodeInfo, Tokenize
from slipstream.types import SamplingParams

PROMPT_LOGPROBS_MAX = 262_144
"""Of one prompt, the likeliest alternatives counted: 16 MB or so, held and sent in one piece."""

LATE = Problem(code=ErrorCode.DEADLINE, message="The request's time budget is used up.")


class Limits(NamedTuple):
    """What every worker of a model can take, and the largest of them; 0 and empty while there is
    none."""

    max_model_len: int
    vocab_size: int
    kv_layout_id: str
    largest_model_len: int


def limits(nodes: Iterable[NodeInfo], max_model_len: int) -> Limits:
    """`max_model_len`: as set for this process; 0: nothing but the least of the workers'."""
    offered = [node.worker for node in nodes if node.worker is not None]
    lengths = [worker.max_model_len for worker in offered]
    set_here = [max_model_len] if max_model_len else []
    return Limits(
        min([*set_here, *lengths], default=0),
        min((worker.vocab_size for worker in offered), default=0),
        min((worker.kv_layout_id for worker in offered), default=""),
        min([*set_here, *([max(lengths)] if lengths else [])], default=0),
    )


def unknown_token(tokens: Sequence[int], vocab_size: int) -> Problem | None:
    for token_id in (min(tokens), max(tokens)):
        if token_id < 0 or 0 < vocab_size <= token_id:
            return unusable(f"Token id {token_id} is outside the vocabulary.")
    return None


def fitted(submission: Tokenize, num_prompt: int, max_model_len: int) -> SamplingParams | Problem:
    """The sampling parameters with no more `max_tokens` than the context leaves, if that is
    allowed."""
    sampling = submission.sampling
    if problem := _too_many_logprobs(sampling.prompt_logprobs, num_prompt):
        return problem
    if not max_model_len or num_prompt + sampling.max_tokens <= max_model_len:
        return sampling
    if submission.clamp_max_tokens and num_prompt < max_model_len:
        return msgspec.structs.replace(sampling, max_tokens=max_model_len - num_prompt)
    asked = 1 if submission.clamp_max_tokens else sampling.max_tokens
    param = "messages" if isinstance(submission.prompt, ChatPrompt) else "prompt"
    return Problem(
        code=ErrorCode.CONTEXT_LENGTH,
        message=f"This model's maximum context length is {max_model_len} tokens. However, you "
        f"requested {num_prompt + asked} tokens ({num_prompt} in the {param}, {asked} in the "
        f"completion). Please reduce the length of the {param} or completion.",
        param=param,
    )


def granted(
    submission: Tokenize, num_prompt: int, num_accepted: int, limits: Limits
) -> SamplingParams | Problem:
    """What it gets. A stream that has begun was found to fit, by workers that may be away. Where
    its length was left to us it is the same again, unless it is longer already than the least of
    those that are there allows: that one came later."""
    if num_accepted and not submission.clamp_max_tokens:
        return submission.sampling
    fits = num_prompt + num_accepted <= limits.max_model_len
    least = fits or not num_accepted
    most = limits.max_model_len if least else limits.largest_model_len
    return fitted(submission, num_prompt, most)


def _too_many_logprobs(wanted: int | None, num_prompt: int) -> Problem | None:
    if wanted is None or (num_entries := num_prompt * (1 + wanted)) <= PROMPT_LOGPROBS_MAX:
        return None
    return Problem(
        code=ErrorCode.INVALID_VALUE,
        message=f"prompt_logprobs {wanted} of {num_prompt} prompt tokens are {num_entries} log "
        f"probabilities; at most {PROMPT_LOGPROBS_MAX} are given. Ask for fewer of each token, or "
        "send a shorter prompt.",
        param="prompt_logprobs",
    )


def not_ours(asked: str, model: str) -> Problem:
    text = f"This tokenizer serves the model '{model}', not '{asked}'; send the request again."
    return Problem(code=ErrorCode.NOT_READY, message=text, retry_after_s=1.0)


def unusable(message: str) -> Problem:
    return Problem(code=ErrorCode.INVALID_VALUE, message=message, param="prompt")
