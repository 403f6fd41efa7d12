"""The HTTP application: routes, one error shape on every path, and how it is run."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from typing import Any, NamedTuple

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from slipstream.errors import ErrorCode
from slipstream.frontend import (
    adapters_api,
    anthropic_api,
    anthropic_errors,
    chat_api,
    completion_api,
    info_api,
    openapi,
    playground_api,
    responses_api,
    trace_api,
    usage_api,
)
from slipstream.frontend.audit import Audit, Line
from slipstream.frontend.callers import CALLER, TRAIL, Callers
from slipstream.frontend.context import CONTEXT, ERROR, NAMED_BY_CLIENT, REQUEST_ID, Context
from slipstream.frontend.event_ids import new_id
from slipstream.frontend.gateway import Gateway
from slipstream.frontend.http_metrics import ANSWERING, LEFT, STATUS, HttpMetrics
from slipstream.frontend.journal import Journal
from slipstream.frontend.problems import ApiError, api_error, error_response
from slipstream.frontend.responses_store import MemoryStore
from slipstream.frontend.sse import StreamKeeper
from slipstream.frontend.unserved import unserved
from slipstream.frontend.usage_store import UsageStore
from slipstream.frontend.usage_sync import UsageSync
from slipstream.frontend.validate import Limits, check_length, shown, too_large
from slipstream.types import Role

_log = logging.getLogger("slipstream.frontend")


class AppSettings(msgspec.Struct, frozen=True, kw_only=True):
    limits: Limits = Limits()
    allow_lora_updates: bool = False
    routes_file: str = ""
    """Aliases and shadows; empty: none."""
    keep_alive_s: float = 10.0
    """Silence in a stream before an SSE comment is sent."""
    write_stall_s: float = 30.0
    """How long a reader may stand still before it is cut off."""
    system_fingerprint: str = "slipstream"
    response_store_bytes: int = 64 * 2**20
    """How much /v1/responses keeps."""
    response_keep_s: float = 3600.0
    api_keys_file: str = ""
    """Empty: nobody is asked for a key."""


class Books(NamedTuple):
    """What is written down beside the answers; none where it is None."""

    journal: Journal | None = None
    usage: UsageStore | None = None
    audit: Audit | None = None


NO_BOOKS = Books()


def build_app(gateway: Gateway, settings: AppSettings, books: Books = NO_BOOKS) -> web.Application:
    """SetupError: the file of API keys cannot be used."""
    app = web.Application(
        middlewares=[_in_our_shape], client_max_size=settings.limits.max_body_bytes
    )
    http, note = HttpMetrics(), books.audit.act if books.audit else None
    callers = Callers(settings.api_keys_file, note=note)
    sync = None
    if books.usage is not None:
        sync = UsageSync(callers.ledger, books.usage, callers.share, callers.clock)
    app[CONTEXT] = Context(
        gateway=gateway,
        callers=callers,
        limits=settings.limits,
        keeper=StreamKeeper(settings.keep_alive_s, settings.write_stall_s, http),
        http=http,
        responses=MemoryStore(settings.response_store_bytes, settings.response_keep_s),
        journal=books.journal,
        usage=sync,
        audit=books.audit,
        allow_lora_updates=settings.allow_lora_updates,
        system_fingerprint=settings.system_fingerprint,
        started_unix_s=int(time.time()),
        version=_version(),
    )
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_api.chat_completions),
            web.post("/v1/completions", completion_api.completions),
            web.post("/v1/responses", responses_api.responses),
            web.post("/v1/responses/input_tokens", responses_api.input_tokens),
            web.get("/v1/responses/{id}", responses_api.response),
            web.delete("/v1/responses/{id}", responses_api.delete),
            web.get("/v1/responses/{id}/input_items", responses_api.input_items),
            web.post("/v1/responses/{id}/cancel", responses_api.cancel),
            web.post("/v1/messages", anthropic_api.messages),
            web.post("/v1/messages/count_tokens", anthropic_api.count_tokens),
            web.get("/v1/usage", usage_api.usage),
            web.get("/v1/models", info_api.models),
            web.get("/v1/models/{model:.+}", info_api.model),
            web.post("/v1/load_lora_adapter", adapters_api.load),
            web.post("/v1/unload_lora_adapter", adapters_api.unload),
            web.post("/tokenize", info_api.tokenize),
            web.post("/detokenize", info_api.detokenize),
            web.get("/health", info_api.ready),
            web.get("/livez", info_api.live),
            web.get("/readyz", info_api.ready),
            web.get("/metrics", info_api.metrics),
            web.get("/version", info_api.version),
            web.get("/openapi.json", openapi.openapi),
            web.get("/cluster", info_api.cluster),
            web.get("/trace/{name}", trace_api.trace),
        ]
    )
    playground_api.install(app)
    app.cleanup_ctx.append(_chores)
    app.on_response_prepare.append(_sign)
    return app


def _version() -> str:
    try:
        return distribution_version("slipstream")
    except PackageNotFoundError:  # run from the sources
        return "0"


async def _chores(app: web.Application) -> AsyncIterator[None]:
    context = app[CONTEXT]
    chores = [context.keeper.run(), context.callers.watch()]
    if context.usage is not None:
        chores.append(context.usage.run())
    tasks = [asyncio.create_task(chore) for chore in chores]
    yield
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    if context.usage is not None:
        await context.usage.close()


# --- Every request --------------------------------------------------------------------------------

BEGUN_S = web.RequestKey("begun_s", float)
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@web.middleware
async def _in_our_shape(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    request[BEGUN_S] = time.monotonic()
    given = request.headers.get("X-Request-Id", "")
    named = _ID.fullmatch(given) is not None
    request[REQUEST_ID] = given if named else new_id()
    request[NAMED_BY_CLIENT] = named
    try:
        response = await _answered(request, handler)
    except (ConnectionError, asyncio.CancelledError):
        _over(request, LEFT)
        raise  # the client is gone; aiohttp ends the connection quietly
    _over(request, response.status)
    return response


def _over(request: web.Request, status: int) -> None:
    context = request.app[CONTEXT]
    context.http.over(request, status)
    status = request.get(STATUS, status)
    asks = request.method in ("GET", "HEAD")
    if context.audit is not None and (not asks or status in (401, 403)):
        context.audit.note(_line(request, status))


def _line(request: web.Request, status: int) -> Line:
    trail, caller, now_s = request.get(TRAIL), request.get(CALLER), time.monotonic()
    said = Line(
        act="request",
        request_id=request[REQUEST_ID],
        key=caller.tenant if caller else "",
        client=request.remote or "",
        method=request.method,
        path=request.path,
        status=status,
        error=request.get(ERROR, ""),
        duration_ms=round(1000 * (now_s - request[BEGUN_S]), 1),
    )
    return said if trail is None else trail.tell(said)


async def _answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await _let_in(request, handler)
    except ApiError as error:
        return _refusal(request, error)
    except web.HTTPException as error:
        return _refusal(request, _known(request, error))
    except ConnectionError:
        raise
    except Exception:  # noqa: BLE001 (a bug must neither end the connection nor show its insides)
        _log.exception(
            "%s %s failed, request %s", request.method, request.path, request[REQUEST_ID]
        )
        if request.get(ANSWERING) and request.transport is not None:
            # The answer has begun; another one in the middle of it would be taken for a part.
            request.transport.abort()
            raise ConnectionError("a bug in the middle of an answer") from None
        return _refusal(request, _internal(request[REQUEST_ID]))


async def _let_in(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What is cheap to refuse is refused first: who asks, how long the body is, how often."""
    context = request.app[CONTEXT]
    caller = request[CALLER] = context.callers.identify(request)
    if request.method == "POST":
        check_length(request, context.limits.max_body_bytes)
    if request.method != "POST":
        return await handler(request)
    frontends = sum(node.role is Role.FRONTEND for node in context.gateway.status().nodes)
    with caller.working(frontends) as trail:
        request[TRAIL] = trail
        return await handler(request)


def _refusal(request: web.Request, error: ApiError) -> web.Response:
    request[ERROR] = error.problem.code
    if anthropic_errors.is_ours(request.path):
        return anthropic_errors.anthropic_error(request, error)
    return error_response(error)


def _known(request: web.Request, error: web.HTTPException) -> ApiError:
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            problem = api_error(
                ErrorCode.METHOD_NOT_ALLOWED,
                f"{shown(request.path)} does not take {shown(request.method)}; use {allowed}.",
            )
            return ApiError(problem.problem, {"Allow": allowed})
        case web.HTTPNotFound():
            return unserved(request.path) or api_error(
                ErrorCode.UNKNOWN_URL, f"Invalid URL ({request.method} {shown(request.path)})."
            )
        case web.HTTPRequestEntityTooLarge():
            return too_large(request.app[CONTEXT].limits.max_body_bytes)
    return api_error(ErrorCode.INVALID_VALUE, f"The HTTP request is not valid: {error.reason}.")


def _internal(request_id: str) -> ApiError:
    message = f"Something broke on our side. The server's log has it under request {request_id}."
    return api_error(ErrorCode.INTERNAL, message)


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-request-id"] = request[REQUEST_ID]
    if anthropic_errors.is_ours(request.path):
        response.headers["request-id"] = request[REQUEST_ID]
    response.headers["Server"] = "slipstream"
    if request.method == "POST" and CALLER in request:
        response.headers.update(request[CALLER].headers())
    request[ANSWERING] = True


# --- How it is run --------------------------------------------------------------------------------


class _Protocol(RequestHandler):
    """One connection. What is not even HTTP gets our error shape too."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; nothing else can be said in it")
        request_id = uuid.uuid4().hex
        if status >= 500:
            _log.error("request %s failed", request_id, exc_info=exc)
            response = error_response(_internal(request_id))
        else:
            reason = (str(message or exc or "").splitlines() or [""])[0]
            error = api_error(
                ErrorCode.INVALID_VALUE, f"The HTTP request is not valid: {shown(reason)}."
            )
            response = error_response(error)
        response.headers["x-request-id"] = request_id
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=True,
            **_CONNECTION,
        )


_CONNECTION: dict[str, Any] = {
    "access_log": None,
    # A compressed body is refused by its header; the default would unpack it first.
    "auto_decompress": False,
    "keepalive_timeout": 75.0,
    "lingering_time": 2.0,
}


def make_runner(app: web.Application, shutdown_timeout_s: float = 5.0) -> web.AppRunner:
    """Runs `app` so that a client's leaving cancels its handler, which closes its streams."""
    return _Runner(
        app, handler_cancellation=True, shutdown_timeout=shutdown_timeout_s, **_CONNECTION
    )
