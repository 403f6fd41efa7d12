"""POST /v1/completions."""

import contextlib
from collections.abc import AsyncGenerator, Sequence

import msgspec
from aiohttp import web

from slipstream.frontend import calls, validate
from slipstream.frontend.context import CONTEXT, Context
from slipstream.frontend.gateway import ClusterStatus, Gateway
from slipstream.frontend.generation import Answers, Call, Choice, alternatives, finite
from slipstream.frontend.messages_in import prompts
from slipstream.frontend.openai import (
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
    UsageOut,
)
from slipstream.frontend.problems import ApiError
from slipstream.frontend.sse import event, stream_events
from slipstream.messages import TextDelta, TextLogprob, TextPrompt, TokenPrompt

MAX_TOKENS = 16
"""OpenAI's default for this path."""

_decoder = msgspec.json.Decoder(CompletionRequest)


async def completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _decoder, context.limits.max_body_bytes)
    status = context.gateway.status()
    validate.check_ready(status)
    call, asked = _call(request, context, body, status)
    heads = [""] * len(call.submissions)
    if body.echo:
        heads = [
            text for prompt in asked for text in [await _text(context.gateway, prompt)] * call.n
        ]
    with Answers(context.gateway, call) as answers:
        if not call.stream:
            return calls.reply(await _collected(call, answers, heads), answers)
        async with contextlib.aclosing(_events(call, answers, heads)) as events:
            return await stream_events(request, events, context.keeper, answers.headers)


def _call(
    request: web.Request, context: Context, body: CompletionRequest, status: ClusterStatus
) -> tuple[Call, Sequence[TextPrompt | TokenPrompt]]:
    validate.check_model(body.model, status)
    n = validate.choices(body.n, context.limits)
    validate.check_served(body, n)
    if body.logprobs is not None:
        validate.integer("logprobs", body.logprobs, 0, validate.LOGPROBS_MAX)
        if body.echo:
            validate.refuse("echo is not served together with logprobs; leave one out.", "echo")
    special = body.add_special_tokens
    asked = prompts(body.prompt, True if special is None else special, context.limits, status)
    wanted = validate.wanted_tokens(body, None, status)
    sampling = validate.sampling(
        body,
        status,
        context.default_sampling,
        max_tokens=MAX_TOKENS if wanted is None else wanted,
        logprobs=body.logprobs,
    )
    # Our default of 16 is no reason to refuse a prompt that leaves room for fewer.
    clamp = wanted is None
    return calls.new_call(request, context, body, "cmpl", asked, n, sampling, clamp=clamp), asked


async def _text(gateway: Gateway, prompt: TextPrompt | TokenPrompt) -> str:
    if isinstance(prompt, TextPrompt):
        return prompt.text
    decoded = await gateway.codec(None, prompt.tokens)
    if decoded.problem is not None:
        raise ApiError(decoded.problem)
    return decoded.text


def _logprobs(entries: Sequence[TextLogprob], offset: int, top: int) -> CompletionLogprobs:
    """`offset`: characters of the answer before these tokens. The sampled token is always among the
    alternatives, as vLLM has it."""
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.text)
    return CompletionLogprobs(
        tokens=[entry.text for entry in entries],
        token_logprobs=[finite(entry.logprob) for entry in entries],
        top_logprobs=[
            {entry.text: finite(entry.logprob)}
            | {one.text: finite(one.logprob) for one in alternatives(entry, top)}
            for entry in entries
        ],
        text_offset=offsets,
    )


def _chunk(
    call: Call,
    choices: list[CompletionChoice],
    usage: UsageOut | msgspec.UnsetType = msgspec.UNSET,
) -> bytes:
    return event(
        CompletionChunk(
            id=call.id,
            object="text_completion",
            created=call.created,
            model=call.model,
            system_fingerprint=call.system_fingerprint,
            choices=choices,
            usage=usage,
        )
    )


async def _events(call: Call, answers: Answers, heads: list[str]) -> AsyncGenerator[bytes, None]:
    """What has arrived since the last time, in one piece."""
    offsets = [0] * len(heads)
    answers.open()
    while await answers.more():
        events = b""
        for index, delta in answers.take():
            events += _text_chunk(call, answers.choices[index], index, delta, heads, offsets)
        if events:
            yield events
    if call.include_usage:
        yield _chunk(call, [], answers.usage())


def _text_chunk(
    call: Call, choice: Choice, index: int, delta: TextDelta, heads: list[str], offsets: list[int]
) -> bytes:
    """Nothing for a delta that has nothing to show. `heads` that are shown are taken out."""
    usage = choice.running_usage() if call.continuous_usage else msgspec.UNSET
    text = heads[index] + delta.text
    heads[index] = ""
    finished = delta.finish_reason is not None
    if not (text or finished or delta.logprobs or call.continuous_usage):
        return b""
    out = CompletionChoice(
        index=index,
        text=text,
        logprobs=_delta_logprobs(call, delta, offsets[index]),
        finish_reason=choice.finish_reason if finished else None,
        stop_reason=choice.stop_reason if finished else msgspec.UNSET,
    )
    offsets[index] += sum(len(entry.text) for entry in delta.logprobs or ())
    return _chunk(call, [out], usage)


def _delta_logprobs(call: Call, delta: TextDelta, offset: int) -> CompletionLogprobs | None:
    top = call.submissions[0].sampling.logprobs
    if top is None or delta.logprobs is None:
        return None
    return _logprobs(delta.logprobs, offset, top)


async def _collected(call: Call, answers: Answers, heads: list[str]) -> CompletionReply:
    texts = [[head] for head in heads]
    entries: list[list[TextLogprob]] = [[] for _ in heads]
    answers.open()
    while await answers.more():
        for index, delta in answers.take():
            texts[index].append(delta.text)
            entries[index] += delta.logprobs or ()
    top = call.submissions[0].sampling.logprobs
    return CompletionReply(
        id=call.id,
        object="text_completion",
        created=call.created,
        model=call.model,
        system_fingerprint=call.system_fingerprint,
        choices=[
            CompletionChoice(
                index=index,
                text="".join(texts[index]),
                logprobs=None if top is None else _logprobs(entries[index], 0, top),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(answers.choices)
        ],
        usage=answers.usage(),
    )
