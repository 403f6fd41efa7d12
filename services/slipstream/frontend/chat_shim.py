"""`chat_api.chat_call` until it has one that knows tools and formats; goes when that is there."""

from typing import Any

import msgspec
from aiohttp import web

from slipstream.frontend import chat_api
from slipstream.frontend.context import Context
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.generation import Call
from slipstream.frontend.openai import ChatRequest
from slipstream.messages import ChatPrompt, Tokenize
from slipstream.types import Constraint, ConstraintKind


class ChatBody(ChatRequest, kw_only=True):
    parallel_tool_calls: bool | None = None
    tools: list[dict[str, Any]] | None = None


def chat_call(
    request: web.Request, context: Context, body: ChatBody, status: ClusterStatus
) -> Call:
    plain = msgspec.structs.replace(
        body, tools=None, tool_choice=None, response_format=None, continue_final_message=None
    )
    call, _ = chat_api._call(request, context, plain, status)
    return msgspec.structs.replace(call, submissions=[_full(body, s) for s in call.submissions])


def _full(body: ChatBody, submission: Tokenize) -> Tokenize:
    prompt = submission.prompt
    assert isinstance(prompt, ChatPrompt)
    choice = body.tool_choice or "auto"
    parallel = body.parallel_tool_calls
    constraint = None
    match body.response_format:
        case {"type": "json_object"}:
            constraint = Constraint(kind=ConstraintKind.JSON)
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            text = msgspec.json.encode(schema).decode()
            constraint = Constraint(kind=ConstraintKind.JSON_SCHEMA, text=text)
    return msgspec.structs.replace(
        submission,
        constraint=constraint,
        prompt=msgspec.structs.replace(
            prompt,
            tools=body.tools,
            tool_choice=choice if isinstance(choice, str) else f"={choice['function']['name']}",
            parallel_tool_calls=True if parallel is None else parallel,
            continue_final_message=bool(body.continue_final_message),
        ),
    )
