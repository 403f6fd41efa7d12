"""Anthropic's API: POST /v1/messages, POST /v1/messages/count_tokens."""

import contextlib
from collections.abc import AsyncGenerator
from functools import partial

import msgspec
from aiohttp import web

from slipstream.frontend import calls, validate
from slipstream.frontend.anthropic_errors import manner
from slipstream.frontend.anthropic_input import NAMES, Asked, read, sampling_fields
from slipstream.frontend.anthropic_render import Rendering
from slipstream.frontend.anthropic_shapes import CountTokensRequest, MessagesRequest, TokensCount
from slipstream.frontend.calls import json_response
from slipstream.frontend.context import CONTEXT
from slipstream.frontend.generation import Answers
from slipstream.frontend.inner_chat import chat, count_chat_tokens, naming, skipped_header
from slipstream.frontend.sse import stream_events

_decoder = msgspec.json.Decoder(MessagesRequest)
_count_decoder = msgspec.json.Decoder(CountTokensRequest)


async def messages(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _decoder)
    status = calls.asked(request, context, body.model)
    asked = read(body)
    fields = asked.fields | sampling_fields(body)
    with naming(NAMES, asked.origins):
        call = chat(request, context, fields, status, "msg_")
    with Answers(context.gateway, call, context.journal) as answers:
        choice = answers.choices[0]
        named = partial(answers.ids.named, 0)
        rendering = Rendering(call.id, call.model, choice, streams=call.stream, named=named)
        async with contextlib.aclosing(_events(asked, rendering, answers)) as events:
            if call.stream:
                return await stream_events(
                    request,
                    events,
                    context.keeper,
                    lambda: answers.headers() | skipped_header(asked.skipped),
                    manner(request),
                )
            async for _ in events:
                pass
        response = calls.reply(rendering.reply, answers)
        response.headers.update(skipped_header(asked.skipped))
        return response


async def _events(
    asked: Asked, rendering: Rendering, answers: Answers
) -> AsyncGenerator[bytes, None]:
    """What has arrived since the last time, in one piece."""
    with naming(NAMES, asked.origins):
        await answers.open()
        while await answers.more():
            if events := b"".join(rendering.take(delta) for _, delta in answers.take()):
                yield events
    if last := rendering.end():
        yield last


async def count_tokens(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _count_decoder)
    status = calls.asked(request, context, body.model)
    asked = read(body)
    with naming(NAMES, asked.origins):
        count = await count_chat_tokens(request, context, asked.fields, status)
    return json_response(TokensCount(input_tokens=count))
