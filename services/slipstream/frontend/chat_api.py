"""POST /v1/chat/completions."""

import contextlib
from collections.abc import AsyncGenerator, Iterator

import msgspec
from aiohttp import web

from slipstream.frontend import calls, sampling, validate
from slipstream.frontend.context import CONTEXT, Context
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.generation import (
    Answers,
    Call,
    Choice,
    alternatives,
    finite,
    prompt_logprobs,
)
from slipstream.frontend.messages_in import chat_messages, prompt_end, template_args
from slipstream.frontend.openai import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    ChatRequest,
    TokenLogprobOut,
    ToolCallOut,
    TopLogprob,
    UsageOut,
)
from slipstream.frontend.sse import event, stream_events
from slipstream.frontend.tool_calls import Blocks, Change, ToolCall
from slipstream.frontend.tools_in import tools_of
from slipstream.messages import ChatPrompt, PartKind, TextDelta, TextLogprob

_decoder = msgspec.json.Decoder(ChatRequest)
_FIRST = ChatDelta(role="assistant", content="")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _decoder)
    status = calls.asked(request, context, body.model)
    call = chat_call(request, context, body, status)
    top = body.top_logprobs or 0
    with Answers(context.gateway, call, context.journal) as answers:
        if not call.stream:
            return calls.reply(await _collected(call, answers, top), answers)
        async with contextlib.aclosing(_events(call, answers, top)) as events:
            return await stream_events(request, events, context.keeper, answers.headers)


def chat_call(
    request: web.Request,
    context: Context,
    body: ChatRequest,
    status: ClusterStatus,
    prefix: str = "chatcmpl-",
) -> Call:
    """ApiError for what is not to be served."""
    n = sampling.choices(body.n, context.limits)
    validate.check_served(body, n)
    wanted = sampling.wanted_tokens(body, body.max_completion_tokens, status)
    top = _top_logprobs(body)
    params = sampling.sampling(
        body,
        status,
        max_tokens=wanted or max(status.max_model_len, 1),
        logprobs=top if body.logprobs else None,
    )
    prompt = _prompt(body, context)
    return calls.new_call(
        *(request, context, body, status, prefix, [prompt], n, params),
        clamp=wanted is None,
        parse=True,
        forced=prompt.tool_choice.startswith("="),
    )


def _prompt(body: ChatRequest, context: Context) -> ChatPrompt:
    tools, choice = tools_of(body.tools, body.tool_choice)
    messages = chat_messages(body.messages, context.limits)
    goes_on, generate = prompt_end(
        messages, body.continue_final_message, body.add_generation_prompt
    )
    return ChatPrompt(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        add_generation_prompt=generate,
        continue_final_message=goes_on,
        template_args=template_args(body.chat_template_kwargs),
    )


def _top_logprobs(body: ChatRequest) -> int:
    if not body.top_logprobs:
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
    blocks = [Blocks(call.id, index) for index in range(len(answers.choices))]
    begun = [False] * len(answers.choices)
    await answers.open()
    while await answers.more():
        events = b""
        for index, delta in answers.take():
            choice = answers.choices[index]
            usage = choice.running_usage() if call.continuous_usage else msgspec.UNSET
            if not begun[index]:
                begun[index] = True
                first = _chunk(call, [ChatChunkChoice(index=index, delta=_FIRST)], usage)
                events += answers.ids.named(index, first)
            for chunk in _chunks(call, choice, blocks[index], index, delta, top, usage):
                events += answers.ids.named(index, chunk)
        if events:
            yield events
    if call.include_usage and (last := answers.ids.named(0, _chunk(call, [], answers.usage()))):
        yield last


def _chunks(
    call: Call,
    choice: Choice,
    blocks: Blocks,
    index: int,
    delta: TextDelta,
    top: int,
    usage: UsageOut | msgspec.UnsetType,
) -> Iterator[bytes]:
    """Nothing for a delta that has nothing to show. Its log probabilities are in its first chunk,
    the end in its last one."""
    finished = delta.finish_reason is not None
    shown = list(_deltas(blocks, delta))
    if not shown and (finished or delta.logprobs or usage is not msgspec.UNSET):
        shown = [ChatDelta() if finished else ChatDelta(content="")]
    for number, one in enumerate(shown, 1):
        last = finished and number == len(shown)
        chunk = ChatChunkChoice(
            index=index,
            delta=one,
            logprobs=_logprobs(delta.logprobs if number == 1 else None, top),
            finish_reason=choice.finish_reason if last else None,
            stop_reason=choice.stop_reason if last else msgspec.UNSET,
        )
        yield _chunk(call, [chunk], usage)


def _deltas(blocks: Blocks, delta: TextDelta) -> Iterator[ChatDelta]:
    for change, block, text in blocks.take(delta):
        match change, block.kind:
            case Change.GREW, PartKind.CONTENT:
                yield ChatDelta(content=text)
            case Change.GREW, PartKind.REASONING:
                yield ChatDelta(reasoning=text, reasoning_content=text)
            case Change.OPENED, PartKind.CALL:
                function = CalledFunction(name=block.name, arguments="")
                number = blocks.num_calls - 1
                opened = ToolCallOut(
                    index=number, id=block.call_id, type="function", function=function
                )
                yield ChatDelta(tool_calls=[opened])
            case Change.GREW, _:
                function = CalledFunction(arguments=text)
                yield ChatDelta(
                    tool_calls=[ToolCallOut(index=blocks.num_calls - 1, function=function)]
                )


async def _collected(call: Call, answers: Answers, top: int) -> ChatReply:
    blocks = [Blocks(call.id, index) for index in range(len(answers.choices))]
    entries: list[list[TextLogprob]] = [[] for _ in answers.choices]
    await answers.open()
    while await answers.more():
        for index, delta in answers.take():
            for _ in blocks[index].take(delta):
                pass  # it is kept there
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
                message=_message(blocks[index]),
                logprobs=_logprobs(entries[index], top) if call.wants_logprobs else None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(answers.choices)
        ],
        usage=answers.usage(),
        prompt_logprobs=prompt_logprobs(answers.choices[0]),
    )


def _message(blocks: Blocks) -> ChatMessage:
    content, reasoning = blocks.text(PartKind.CONTENT), blocks.text(PartKind.REASONING)
    called = [_called(call) for call in blocks.calls()]
    return ChatMessage(
        content=content if content or not called else None,
        reasoning=reasoning or msgspec.UNSET,
        reasoning_content=reasoning or msgspec.UNSET,
        tool_calls=called or msgspec.UNSET,
    )


def _called(call: ToolCall) -> ToolCallOut:
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return ToolCallOut(id=call.id, type="function", function=function)
