"""/v1/responses: answers in items and events, and what is kept of them."""

import contextlib
import re
from collections.abc import AsyncGenerator
from functools import partial
from typing import NoReturn

import msgspec
from aiohttp import web

from slipstream.errors import ERRORS, ErrorCode
from slipstream.frontend import calls, validate
from slipstream.frontend.callers import CALLER
from slipstream.frontend.calls import json_response
from slipstream.frontend.context import CONTEXT
from slipstream.frontend.generation import Answers
from slipstream.frontend.http_metrics import STATUS
from slipstream.frontend.inner_chat import chat, count_chat_tokens, naming, skipped_header
from slipstream.frontend.problems import ApiError
from slipstream.frontend.responses_input import NAMES, remember, with_ids
from slipstream.frontend.responses_render import Rendering, broken
from slipstream.frontend.responses_request import Asked, begun, chat_fields, read
from slipstream.frontend.responses_shapes import (
    InputItemList,
    InputTokens,
    InputTokensRequest,
    ResponseDeleted,
    ResponsesRequest,
)
from slipstream.frontend.responses_store import Kept, OwnStore, ResponseStore, kept
from slipstream.frontend.sse import Manner, stream_events

PAGE_ITEMS, PAGE_ITEMS_MAX = 20, 100
MANNER = Manner(b"", broken)

_decoder = msgspec.json.Decoder(ResponsesRequest)
_count_decoder = msgspec.json.Decoder(InputTokensRequest)


async def responses(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _decoder)
    status = calls.asked(request, context, body.model)
    own = _own(request)
    asked = await read(body, own, context.limits.max_body_bytes)
    with naming(NAMES, asked.origins):
        fields = chat_fields(body, asked)
        call = chat(request, context, fields, status, "resp_")
    top = call.submissions[0].sampling.logprobs
    store = own if body.store is not False else None
    with Answers(context.gateway, call, context.journal) as answers:
        named = partial(answers.ids.named, 0)
        rendering = Rendering(begun(body, asked, call), top, streams=call.stream, named=named)
        events = _events(request, asked, rendering, answers, store)
        async with contextlib.aclosing(events):
            if call.stream:
                return await stream_events(
                    request,
                    events,
                    context.keeper,
                    lambda: answers.headers() | skipped_header(asked.tools.skipped),
                    MANNER,
                )
            async for _ in events:
                pass
        response = calls.reply(rendering.body, answers)
        response.headers.update(skipped_header(asked.tools.skipped))
        return response


async def _events(
    request: web.Request,
    asked: Asked,
    rendering: Rendering,
    answers: Answers,
    store: ResponseStore | None,
) -> AsyncGenerator[bytes, None]:
    """What has arrived since the last time, in one piece. With a `store` the response is kept
    before its end is told. ApiError while nothing has been told; later that is an event."""
    try:
        with naming(NAMES, asked.origins):
            await answers.open()
            while await answers.more():
                if events := b"".join(rendering.take(delta) for _, delta in answers.take()):
                    yield events
    except ApiError as error:
        if not (rendering.streams and rendering.begun):
            raise
        request[STATUS] = ERRORS[error.problem.code].status
        yield rendering.fail(error.problem)
        return
    last = rendering.end(answers.choices[0])
    if store is not None:
        body = rendering.body
        items = with_ids(asked.items, body.id.removeprefix("resp_"))
        messages = remember(asked.conversation, rendering.blocks)
        await store.keep(body.id, kept(body, items, messages))
    if last:
        yield last


# --- What is kept ---------------------------------------------------------------------------------


def _own(request: web.Request) -> ResponseStore:
    return OwnStore(request.app[CONTEXT].responses, request[CALLER].tenant)


async def _found(request: web.Request) -> Kept:
    store, response_id = _own(request), request.match_info["id"]
    entry = await store.find(response_id)
    if entry is None:
        _refuse_unknown(store, response_id)
    return entry


def _refuse_unknown(store: ResponseStore, response_id: str) -> NoReturn:
    validate.refuse(
        f"No response is kept by the id {validate.shown(response_id)}. {store.limits()}.",
        "response_id",
        ErrorCode.RESPONSE_NOT_FOUND,
    )


async def response(request: web.Request) -> web.Response:
    if request.query.get("stream", "false") != "false":
        validate.refuse(
            "A response that is kept is not streamed again; leave stream out.",
            "stream",
            ErrorCode.UNSUPPORTED_PARAMETER,
        )
    entry = await _found(request)
    return web.Response(body=entry.response, content_type="application/json")


async def delete(request: web.Request) -> web.Response:
    store, response_id = _own(request), request.match_info["id"]
    if not await store.drop(response_id):
        _refuse_unknown(store, response_id)
    return json_response(ResponseDeleted(id=response_id))


async def cancel(request: web.Request) -> web.Response:
    await _found(request)
    validate.refuse(
        "This response is complete; only responses in the background can be cancelled, and none "
        "runs there. To end one that runs, close its connection.",
        "response_id",
    )


async def input_items(request: web.Request) -> web.Response:
    entry = await _found(request)
    query = request.query
    limit = query.get("limit", str(PAGE_ITEMS))
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= PAGE_ITEMS_MAX:
        validate.refuse(
            f"limit must be at least 1 and at most {PAGE_ITEMS_MAX}, but is "
            f"{validate.shown(limit)}.",
            "limit",
        )
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        validate.refuse(f"order must be asc or desc, but is {validate.shown(order)}.", "order")
    items = msgspec.json.decode(entry.input_items)[:: 1 if order == "asc" else -1]
    if after := query.get("after"):
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            validate.refuse(f"after names no item: {validate.shown(after)}.", "after")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    return json_response(
        InputItemList(
            data=page,
            first_id=page[0]["id"] if page else None,
            last_id=page[-1]["id"] if page else None,
            has_more=len(page) < len(items),
        )
    )


async def input_tokens(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _count_decoder)
    status = calls.asked(request, context, body.model)
    asked = await read(body, _own(request), context.limits.max_body_bytes)
    fields = {
        "model": body.model,
        "messages": asked.messages,
        "tools": asked.tools.functions,
        "tool_choice": asked.tools.choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": asked.format,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    with naming(NAMES, asked.origins):
        count = await count_chat_tokens(request, context, fields, status)
    return json_response(InputTokens(input_tokens=count))
