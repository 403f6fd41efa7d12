"""POST /v1/completions."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import msgspec
from aiohttp import web

from slipstream.frontend import calls, sampling, validate
from slipstream.frontend.context import CONTEXT, Context
from slipstream.frontend.gateway import ClusterStatus, Gateway
from slipstream.frontend.generation import (
    Answers,
    Call,
    Choice,
    alternatives,
    finite,
    prompt_logprobs,
)
from slipstream.frontend.messages_in import prompts
from slipstream.frontend.openai import (
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
    StopReason,
    UsageOut,
)
from slipstream.frontend.problems import ApiError
from slipstream.frontend.sse import event, stream_events
from slipstream.messages import TextDelta, TextLogprob, TextPrompt, TokenPrompt
from slipstream.types import FinishReason

MAX_TOKENS = 16
"""OpenAI's default for this path."""

_decoder = msgspec.json.Decoder(CompletionRequest)


async def completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _decoder)
    status = calls.asked(request, context, body.model)
    call, asked = _call(request, context, body, status)
    shown = Shown(bool(body.echo), body.max_tokens != 0, body.prompt_logprobs is not None)
    heads = [""] * len(call.submissions)
    if shown.echo:
        heads = [
            text
            for prompt in asked
            for text in [await _text(context.gateway, prompt, status.model)] * call.n
        ]
    with Answers(context.gateway, call, context.journal) as answers:
        if not call.stream:
            return calls.reply(await _collected(call, answers, heads, shown), answers)
        async with contextlib.aclosing(_events(call, answers, heads, shown)) as events:
            return await stream_events(request, events, context.keeper, answers.headers)


class Shown(NamedTuple):
    """Of a choice: the prompt, what comes after it, or both."""

    echo: bool
    answers: bool
    """False with max_tokens 0: a token is made, for that is how a prompt is computed, and kept
    back."""
    scores: bool
    """`prompt_logprobs`"""

    def delta(self, delta: TextDelta) -> TextDelta:
        if self.answers:
            return delta
        return msgspec.structs.replace(delta, text="", logprobs=None)

    def end(self, choice: Choice) -> tuple[str, StopReason]:
        if self.answers:
            return choice.finish_reason, choice.stop_reason
        return FinishReason.LENGTH.value, None

    def usage(self, usage: UsageOut) -> UsageOut:
        if self.answers:
            return usage
        return msgspec.structs.replace(usage, completion_tokens=0, total_tokens=usage.prompt_tokens)

    def entries(self, delta: TextDelta) -> list[TextLogprob]:
        prompt = delta.prompt_logprobs if self.echo else None
        return [*(prompt or ()), *(delta.logprobs or ())]


def _call(
    request: web.Request, context: Context, body: CompletionRequest, status: ClusterStatus
) -> tuple[Call, Sequence[TextPrompt | TokenPrompt]]:
    n = sampling.choices(body.n, context.limits)
    validate.check_served(body, n)
    special = body.add_special_tokens
    asked = prompts(body.prompt, True if special is None else special, context.limits, status)
    wanted = sampling.wanted_tokens(body, None, status, least=0 if body.echo else 1)
    if body.logprobs is not None:
        validate.integer("logprobs", body.logprobs, 0, validate.LOGPROBS_MAX)
    params = sampling.sampling(
        body,
        status,
        max_tokens=MAX_TOKENS if wanted is None else max(1, wanted),
        logprobs=body.logprobs,
    )
    if body.echo and body.logprobs is not None:
        most = max(body.logprobs, params.prompt_logprobs or 0)
        params = msgspec.structs.replace(params, prompt_logprobs=most)
    # Our default of 16 is no reason to refuse a prompt that leaves room for fewer.
    clamp = wanted is None
    given = request, context, body, status
    return calls.new_call(*given, "cmpl-", asked, n, params, clamp=clamp), asked


async def _text(gateway: Gateway, prompt: TextPrompt | TokenPrompt, model: str) -> str:
    if isinstance(prompt, TextPrompt):
        return prompt.text
    decoded = await gateway.codec(None, prompt.tokens, model)
    if decoded.problem is not None:
        raise ApiError(decoded.problem)
    return decoded.text


def _logprobs(
    entries: Sequence[TextLogprob], offset: int, top: int, begins: bool
) -> CompletionLogprobs:
    """`offset`: characters before these tokens. `begins`: the first one is a prompt's, with nothing
    before it. A token is always among its alternatives, as vLLM has it."""
    no_first = [None] if begins and entries else []
    rest = entries[len(no_first) :]
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.text)
    return CompletionLogprobs(
        tokens=[entry.text for entry in entries],
        token_logprobs=[*no_first, *(finite(entry.logprob) for entry in rest)],
        top_logprobs=[*no_first, *(_tops(entry, top) for entry in rest)],
        text_offset=offsets,
    )


def _tops(entry: TextLogprob, top: int) -> dict[str, float]:
    found = {entry.text: finite(entry.logprob)}
    for one in alternatives(entry, top):
        found.setdefault(one.text, finite(one.logprob))  # of tokens that look alike the likeliest
    return found


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


async def _events(
    call: Call, answers: Answers, heads: list[str], shown: Shown
) -> AsyncGenerator[bytes, None]:
    """What has arrived since the last time, in one piece."""
    offsets = [0] * len(heads)
    await answers.open()
    while await answers.more():
        events = b""
        for index, delta in answers.take():
            choice = answers.choices[index]
            chunk = _text_chunk(call, choice, index, delta, heads, offsets, shown)
            events += answers.ids.named(index, chunk) if chunk else b""
        if events:
            yield events
    usage = shown.usage(answers.usage())
    if call.include_usage and (last := answers.ids.named(0, _chunk(call, [], usage))):
        yield last


def _text_chunk(
    call: Call,
    choice: Choice,
    index: int,
    arrived: TextDelta,
    heads: list[str],
    offsets: list[int],
    shown: Shown,
) -> bytes:
    """Nothing for a delta that has nothing to show. `heads` that are shown are taken out."""
    delta = shown.delta(arrived)
    running = shown.usage(choice.running_usage()) if call.continuous_usage else msgspec.UNSET
    text = heads[index] + delta.text
    heads[index] = ""
    finished = delta.finish_reason is not None
    entries = shown.entries(delta)
    if not (text or finished or entries or call.continuous_usage):
        return b""
    top = call.submissions[0].sampling.logprobs
    logprobs = None
    if top is not None and entries:
        begins = shown.echo and delta.prompt_logprobs is not None
        logprobs = _logprobs(entries, offsets[index], top, begins)
    out = CompletionChoice(
        index=index,
        text=text,
        logprobs=logprobs,
        finish_reason=shown.end(choice)[0] if finished else None,
        stop_reason=shown.end(choice)[1] if finished else msgspec.UNSET,
    )
    offsets[index] += sum(len(entry.text) for entry in entries)
    return _chunk(call, [out], running)


async def _collected(
    call: Call, answers: Answers, heads: list[str], shown: Shown
) -> CompletionReply:
    texts = [[head] for head in heads]
    entries: list[list[TextLogprob]] = [[] for _ in heads]
    await answers.open()
    while await answers.more():
        for index, arrived in answers.take():
            delta = shown.delta(arrived)
            texts[index].append(delta.text)
            entries[index] += shown.entries(delta)
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
                logprobs=None if top is None else _logprobs(entries[index], 0, top, shown.echo),
                finish_reason=shown.end(choice)[0],
                stop_reason=shown.end(choice)[1],
                prompt_logprobs=prompt_logprobs(choice) if shown.scores else msgspec.UNSET,
            )
            for index, choice in enumerate(answers.choices)
        ],
        usage=shown.usage(answers.usage()),
    )
