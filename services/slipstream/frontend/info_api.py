"""Everything that generates nothing: models, tokens, health, metrics."""

import math

import msgspec
from aiohttp import web

from slipstream.core.machine import DeliverCodec
from slipstream.errors import ErrorCode
from slipstream.frontend import gateway, validate
from slipstream.frontend.calls import json_response
from slipstream.frontend.context import CONTEXT, Context
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.info_shapes import (
    Alive,
    Index,
    ModelOut,
    NodeOut,
    Readiness,
    Version,
    WorkerOut,
)
from slipstream.frontend.messages_in import chat_messages, prompt_end, template_args, token_ids
from slipstream.frontend.openai import (
    DetokenizeReply,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    TokenizeReply,
    TokenizeRequest,
)
from slipstream.frontend.problems import RETRY_AFTER_MAX_S, ApiError, api_error
from slipstream.frontend.tools_in import tools_of
from slipstream.messages import ChatPrompt, NodeInfo, Prompt, TextPrompt
from slipstream.runtime.metrics import CONTENT_TYPE, text
from slipstream.types import unpack_tokens

_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)


def _card(context: Context, card: gateway.ModelCard) -> ModelCard:
    return ModelCard(
        id=card.name,
        created=context.started_unix_s,
        root=card.root,
        parent=card.parent,
        max_model_len=card.max_model_len,
    )


async def models(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    cards = context.gateway.status().models
    return json_response(ModelList(data=[_card(context, card) for card in cards]))


async def model(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    name = request.match_info["model"]
    status = context.gateway.status(name)
    validate.check_model(name, status)
    (card,) = (card for card in status.models if card.name == name)
    return json_response(_card(context, card))


async def tokenize(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _tokenize)
    status = _asked(context, body.model)
    coded = await context.gateway.codec(_prompt(body, context), b"", status.model)
    _check(coded)
    tokens = unpack_tokens(coded.tokens)
    return json_response(
        TokenizeReply(
            count=len(tokens),
            max_model_len=status.max_model_len,
            tokens=tokens,
            token_strs=list(coded.token_texts) if body.return_token_strs else None,
        )
    )


def _prompt(body: TokenizeRequest, context: Context) -> Prompt:
    if body.messages is not None and body.prompt is None:
        messages = chat_messages(body.messages, context.limits)
        goes_on, generate = prompt_end(
            messages, body.continue_final_message, body.add_generation_prompt
        )
        return ChatPrompt(
            messages=messages,
            tools=tools_of(body.tools, None).tools,
            add_generation_prompt=generate,
            continue_final_message=goes_on,
            template_args=template_args(body.chat_template_kwargs),
        )
    if body.prompt is None or body.messages is not None:
        raise api_error(
            ErrorCode.MISSING_PARAMETER, "Send either 'prompt' or 'messages'.", "prompt"
        )
    special = body.add_special_tokens
    return TextPrompt(text=body.prompt, add_special_tokens=True if special is None else special)


async def detokenize(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = await validate.read_json(request, _detokenize)
    status = _asked(context, body.model)
    if not body.tokens:
        return json_response(DetokenizeReply(prompt=""))
    tokens = token_ids(body.tokens, "tokens", status)
    coded = await context.gateway.codec(None, tokens, status.model)
    _check(coded)
    return json_response(DetokenizeReply(prompt=coded.text))


def _asked(context: Context, name: str | None) -> ClusterStatus:
    """Who names no model means the first one."""
    status = context.gateway.status(name or "")
    validate.check_ready(status)
    if name is not None:
        validate.check_model(name, status)
    return status


def _check(coded: DeliverCodec) -> None:
    if coded.problem is not None:
        raise ApiError(coded.problem)


async def live(request: web.Request) -> web.Response:
    """The loop turns; nothing more is said."""
    return json_response(Alive())


async def ready(request: web.Request) -> web.Response:
    """A request can be served now, or 503 with what is missing."""
    named = request.query.get("model", "")
    status = request.app[CONTEXT].gateway.status(named)
    if named:
        validate.check_model(named, status)
    serving = status.ready and not status.draining
    word = "draining" if status.draining else "ready" if status.ready else "not_ready"
    said = Readiness(
        status=word,
        reason=status.reason,
        model=status.model,
        max_model_len=status.max_model_len,
        models=[
            ModelOut(name=card.name, ready=not card.reason, reason=card.reason)
            for card in status.models
        ],
        nodes=[_node(node) for node in status.nodes],
    )
    response = json_response(said, 200 if serving else 503)
    if not serving:
        wait_s = min(max(status.retry_after_s, 1.0), RETRY_AFTER_MAX_S)
        response.headers["Retry-After"] = str(math.ceil(wait_s))
    return response


def _node(node: NodeInfo) -> NodeOut:
    worker = node.worker
    return NodeOut(
        node_id=node.node_id,
        role=node.role.value,
        epoch=node.epoch,
        worker=None
        if worker is None
        else WorkerOut(
            num_blocks=worker.num_blocks,
            block_bytes=worker.block_bytes,
            transports=worker.transports,
            quantization=worker.quantization,
        ),
    )


async def cluster(request: web.Request) -> web.Response:
    """What the playground's panel shows; whether or not a request could be served."""
    response = json_response(request.app[CONTEXT].gateway.cluster())
    response.headers["Cache-Control"] = "no-store"
    return response


async def metrics(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    return web.Response(
        body=context.gateway.metrics()
        + text(context.http.families())
        + text(context.callers.families()),
        headers={"Content-Type": CONTENT_TYPE},
    )


async def version(request: web.Request) -> web.Response:
    return json_response(Version(version=request.app[CONTEXT].version))


async def index(request: web.Request) -> web.Response:
    paths = [
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
        *("/v1/models", "/openapi.json", "/readyz", "/metrics"),
    ]
    return json_response(Index(version=request.app[CONTEXT].version, links=paths))
