"""POST /v1/chat/completions."""

import contextlib
from collections.abc import AsyncGenerator

import msgspec
from aiohttp import web

from slipstream.frontend import calls, validate
from slipstream.frontend.context import CONTEXT, Context
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.generation import Answers, Call, Choice, alternatives, finite
from slipstream.frontend.messages_in import chat_messages, template_args
from slipstream.frontend.openai import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    ChatRequest,
    TokenLogprobOut,
    TopLogprob,
    UsageOut,
)
from slipstream.frontend.sse import event, stream_events
from slipstream.messages import ChatPrompt, TextDelta, TextLogprob

_decoder = msgspec.json.Decoder(ChatRequest)
_FIRST = ChatDelta(role="assistant", content="")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _decoder, context.limits.max_body_bytes)
    status = context.gateway.status()
    validate.check_ready(status)
    call, top = _call(request, context, body, status)
    with Answers(context.gateway, call) as answers:
        if not call.stream:
            return calls.reply(await _collected(call, answers, top), answers)
        async with contextlib.aclosing(_events(call, answers, top)) as events:
            return await stream_events(request, events, context.keeper, answers.headers)


def _call(
    request: web.Request, context: Context, body: ChatRequest, status: ClusterStatus
) -> tuple[Call, int]:
    """The call, and how many alternatives to show for each token."""
    validate.check_model(body.model, status)
    n = validate.choices(body.n, context.limits)
    validate.check_served(body, n)
    generate = body.add_generation_prompt
    prompt = ChatPrompt(
        messages=chat_messages(body.messages, context.limits),
        add_generation_prompt=True if generate is None else generate,
        template_args=template_args(body.chat_template_kwargs),
    )
    wanted = validate.wanted_tokens(body, body.max_completion_tokens, status)
    top = _top_logprobs(body)
    sampling = validate.sampling(
        body,
        status,
        context.default_sampling,
        max_tokens=wanted or max(status.max_model_len, 1),
        logprobs=top if body.logprobs else None,
    )
    call = calls.new_call(
        request, context, body, "chatcmpl", [prompt], n, sampling, clamp=wanted is None
    )
    return call, top


def _top_logprobs(body: ChatRequest) -> int:
    if body.top_logprobs is None:
        return 0
    if not body.logprobs:
        validate.refuse("top_logprobs has a meaning only with logprobs: true.", "top_logprobs")
    return validate.integer("top_logprobs", body.top_logprobs, 0, validate.LOGPROBS_MAX)


def _logprobs(entries: list[TextLogprob] | None, top: int) -> ChatLogprobs | None:
    if entries is None:
        return None
    return ChatLogprobs(
        content=[
            TokenLogprobOut(
                token=entry.text,
                logprob=finite(entry.logprob),
                bytes=list(entry.raw),
                top_logprobs=[
                    TopLogprob(token=one.text, logprob=finite(one.logprob), bytes=list(one.raw))
                    for one in alternatives(entry, top)
                ],
            )
            for entry in entries
        ]
    )


def _chunk(
    call: Call,
    choices: list[ChatChunkChoice],
    usage: UsageOut | msgspec.UnsetType = msgspec.UNSET,
) -> bytes:
    return event(
        ChatChunk(
            id=call.id,
            object="chat.completion.chunk",
            created=call.created,
            model=call.model,
            system_fingerprint=call.system_fingerprint,
            choices=choices,
            usage=usage,
        )
    )


async def _events(call: Call, answers: Answers, top: int) -> AsyncGenerator[bytes, None]:
    """What has arrived since the last time, in one piece."""
    begun = [False] * len(answers.choices)
    answers.open()
    while await answers.more():
        events = b""
        for index, delta in answers.take():
            choice = answers.choices[index]
            usage = choice.running_usage() if call.continuous_usage else msgspec.UNSET
            if not begun[index]:
                begun[index] = True
                events += _chunk(call, [ChatChunkChoice(index=index, delta=_FIRST)], usage)
            events += _content_chunk(call, choice, index, delta, top, usage)
        if events:
            yield events
    if call.include_usage:
        yield _chunk(call, [], answers.usage())


def _content_chunk(
    call: Call,
    choice: Choice,
    index: int,
    delta: TextDelta,
    top: int,
    usage: UsageOut | msgspec.UnsetType,
) -> bytes:
    """Nothing for a delta that has nothing to show."""
    finished = delta.finish_reason is not None
    if not (delta.text or finished or delta.logprobs or usage is not msgspec.UNSET):
        return b""
    chunk = ChatChunkChoice(
        index=index,
        delta=ChatDelta(content=delta.text) if delta.text or not finished else ChatDelta(),
        logprobs=_logprobs(delta.logprobs, top),
        finish_reason=choice.finish_reason if finished else None,
        stop_reason=choice.stop_reason if finished else msgspec.UNSET,
    )
    return _chunk(call, [chunk], usage)


async def _collected(call: Call, answers: Answers, top: int) -> ChatReply:
    texts: list[list[str]] = [[] for _ in answers.choices]
    entries: list[list[TextLogprob]] = [[] for _ in answers.choices]
    answers.open()
    while await answers.more():
        for index, delta in answers.take():
            texts[index].append(delta.text)
            entries[index] += delta.logprobs or ()
    return ChatReply(
        id=call.id,
        object="chat.completion",
        created=call.created,
        model=call.model,
        system_fingerprint=call.system_fingerprint,
        choices=[
            ChatChoice(
                index=index,
                message=ChatMessage(content="".join(texts[index])),
                logprobs=_logprobs(entries[index], top) if call.wants_logprobs else None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(answers.choices)
        ],
        usage=answers.usage(),
    )
