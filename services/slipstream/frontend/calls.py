"""From a checked body to submissions, and from a reply to bytes: the same for both APIs."""

import random
import time
import uuid
from collections.abc import Sequence

import msgspec
from aiohttp import web

from slipstream.frontend import validate
from slipstream.frontend.constraints import constraint_of
from slipstream.frontend.context import NAMED_BY_CLIENT, REQUEST_ID, Context
from slipstream.frontend.generation import Answers, Call
from slipstream.frontend.openai import Generate
from slipstream.frontend.sampling import bad_words
from slipstream.frontend.trace_context import trace_context
from slipstream.messages import Prompt, Tokenize
from slipstream.types import SamplingParams


def new_call(
    request: web.Request,
    context: Context,
    body: Generate,
    prefix: str,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingParams,
    *,
    clamp: bool,
    parse: bool = False,
    forced: bool = False,
) -> Call:
    """`parse`: the answers are told apart: reasoning, content, calls. `forced`: the client has
    named the function that is called."""
    include_usage, continuous_usage = validate.stream_options(body)
    call_id = f"{prefix}-{_unique(request)}"
    timeout_s = validate.timeout_s(request, body, context.limits)
    salt = validate.salt(body)
    priority = validate.integer("priority", body.priority or 0, -(2**31), 2**31 - 1)
    constraint, barred = constraint_of(body), bad_words(body)
    submissions: list[Tokenize] = []
    for prompt in prompts:
        # A seed that the client named is the same for all prompts: each is answered as it would be
        # alone. One that we draw differs, or equal prompts would get equal answers.
        seed = random.getrandbits(63) if body.seed is None else sampling.seed
        submissions += [
            Tokenize(
                request_id=f"{call_id}-{len(submissions) + choice}",
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, choice=choice, seed=seed),
                timeout_s=timeout_s,
                salt=salt,
                clamp_max_tokens=clamp,
                constraint=constraint,
                bad_words=barred,
                priority=priority,
                parse=parse,
            )
            for choice in range(n)
        ]
    return Call(
        id=call_id,
        created=int(time.time()),
        model=body.model,
        system_fingerprint=context.system_fingerprint,
        submissions=submissions,
        n=n,
        stream=bool(body.stream),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        forced=forced,
        wants_logprobs=sampling.logprobs is not None,
        context=trace_context(request),
    )


def _unique(request: web.Request) -> str:
    """A client may say the same X-Request-Id twice at a time; what runs here must not clash."""
    request_id = request[REQUEST_ID]
    return f"{request_id}-{uuid.uuid4().hex[:8]}" if request[NAMED_BY_CLIENT] else request_id


def reply(body: msgspec.Struct, answers: Answers) -> web.Response:
    response = json_response(body)
    response.headers.update(answers.headers())
    return response


def json_response(body: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )
