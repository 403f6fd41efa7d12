"""From a checked body to submissions, and from a reply to bytes: the same for both APIs."""

import time
from collections.abc import Iterator, Sequence

import msgspec
from aiohttp import web

from slipstream.errors import ErrorCode
from slipstream.frontend import validate
from slipstream.frontend.callers import CALLER, TRAIL
from slipstream.frontend.constraints import constraint_of
from slipstream.frontend.context import NAMED_BY_CLIENT, REQUEST_ID, Context
from slipstream.frontend.event_ids import (
    HEADER,
    Place,
    created_unix_s,
    drawn_seed,
    form_of,
    last_event,
    new_id,
)
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.generation import Answers, Call
from slipstream.frontend.openai import Generate
from slipstream.frontend.problems import api_error
from slipstream.frontend.sampling import bad_words
from slipstream.frontend.trace_context import trace_context
from slipstream.messages import Prompt, Tokenize
from slipstream.types import SamplingParams

_encode = msgspec.msgpack.Encoder().encode
_OWN = web.RequestKey("own", str)


def asked(request: web.Request, context: Context, name: str) -> ClusterStatus:
    """The model that answers to `name`, in this call. ApiError: there is none, or not now."""
    after = last_event(request)
    status = context.gateway.status(name, after.call_id[-32:] if after else _own(request))
    validate.check_ready(status)
    validate.check_model(name, status)
    return status


def _own(request: web.Request) -> str:
    """What is this call's alone, and stays in its id."""
    if not request[NAMED_BY_CLIENT]:
        return request[REQUEST_ID]
    if _OWN not in request:
        request[_OWN] = new_id()
    return request[_OWN]


def new_call(
    request: web.Request,
    context: Context,
    body: Generate,
    status: ClusterStatus,
    prefix: str,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingParams,
    *,
    clamp: bool,
    parse: bool = False,
    forced: bool = False,
) -> Call:
    """`prefix`: of the id; the client's own name follows only on a dash, for what is kept under the
    others can be asked for. `parse`: the answers are told apart: reasoning, content, calls.
    `forced`: the client has named the function that is called."""
    include_usage, continuous_usage = validate.stream_options(body)
    after = _after(request, body, prefix, len(prompts) * n)
    call_id = after.call_id if after else prefix + _unique(request, prefix)
    timeout_s = validate.timeout_s(request, body, context.limits)
    if after is not None:
        timeout_s = min(timeout_s, max(0.0, created_unix_s(call_id) + timeout_s - time.time()))
    caller, least = request[CALLER], request[CALLER].priority_min
    any_choice = Tokenize(
        request_id=call_id,
        prompt=prompts[0],
        sampling=sampling,
        timeout_s=timeout_s,
        model=status.model,
        adapter=status.adapter,
        salt=caller.salt(validate.salt(body)),
        clamp_max_tokens=clamp,
        constraint=constraint_of(body),
        bad_words=bad_words(body),
        priority=validate.integer("priority", body.priority or 0, least, 2**31 - 1),
        parse=parse,
        tenant=caller.tenant,
        weight=caller.weight,
    )
    submissions = list(_choices(any_choice, prompts, n, draws=body.seed is None))
    _check_size(submissions)
    return Call(
        id=call_id,
        created=created_unix_s(call_id),
        ids=form_of(request),
        after=after,
        model=status.name,
        system_fingerprint=context.system_fingerprint,
        submissions=submissions,
        trail=request[TRAIL],
        stall_timeout_s=context.limits.stall_timeout_s,
        n=n,
        stream=bool(body.stream),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        forced=forced,
        wants_logprobs=sampling.logprobs is not None,
        context=trace_context(request),
    )


def _choices(like: Tokenize, prompts: Sequence[Prompt], n: int, draws: bool) -> Iterator[Tokenize]:
    """Prompt by prompt. Without `draws` the client has named a seed, which is the same for all
    prompts: each is answered as if alone."""
    call_id, change = like.request_id, msgspec.structs.replace
    for number in range(len(prompts) * n):
        seed = drawn_seed(call_id, number // n) if draws else like.sampling.seed
        sampling = change(like.sampling, choice=number % n, seed=seed)
        name, prompt = f"{call_id}-{number}", prompts[number // n]
        yield change(like, request_id=name, prompt=prompt, sampling=sampling)


CALL_BYTES_MAX = 32 << 20
"""Of all choices together: each says the prompt and what the answer must be once more. Half of what
a session may hold unread."""


def _check_size(submissions: Sequence[Tokenize]) -> None:
    if len(submissions) == 1:
        return  # no longer than the body
    num_bytes = 0
    for submission in submissions:
        num_bytes += len(_encode(submission))
        if num_bytes > CALL_BYTES_MAX:
            raise api_error(
                ErrorCode.TOO_LARGE,
                f"The {len(submissions)} choices repeat the prompt and what is asked of the answer "
                f"until they have more than {CALL_BYTES_MAX} bytes. Send several requests.",
            )


def _unique(request: web.Request, prefix: str) -> str:
    """A client may say the same X-Request-Id twice at a time; what runs here must not clash."""
    if prefix.endswith("-") and request[NAMED_BY_CLIENT]:
        return f"{request[REQUEST_ID]}-{_own(request)}"
    return _own(request)


def _after(request: web.Request, body: Generate, prefix: str, choices: int) -> Place | None:
    after = last_event(request)
    if after is None:
        return None
    if not body.stream:
        validate.refuse(f"{HEADER} has a meaning only with stream: true.", HEADER)
    if len(after.seen) != choices or not after.call_id.startswith(prefix):
        validate.refuse(
            f"{HEADER} belongs to another request; send the one that it was an answer to, word for "
            "word.",
            HEADER,
        )
    return after


def reply(body: msgspec.Struct, answers: Answers) -> web.Response:
    response = json_response(body)
    response.headers.update(answers.headers())
    return response


def json_response(body: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )
