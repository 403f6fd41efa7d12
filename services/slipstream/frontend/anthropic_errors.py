"""Refusals and failures in Anthropic's shape, on Anthropic's paths."""

import msgspec
from aiohttp import web

from slipstream.errors import ERRORS, Problem
from slipstream.frontend.anthropic_shapes import AnthropicError, AnthropicErrorReply
from slipstream.frontend.context import REQUEST_ID
from slipstream.frontend.problems import ApiError, error_response
from slipstream.frontend.sse import Manner, named_event

ROOT = "/v1/messages"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Of statuses; the others are `invalid_request_error`."""


def is_ours(path: str) -> bool:
    return path == ROOT or path.startswith(f"{ROOT}/")


def _shaped(problem: Problem, request_id: str) -> AnthropicErrorReply:
    kind = TYPES.get(ERRORS[problem.code].status, "invalid_request_error")
    error = AnthropicError(type=kind, message=problem.message)
    return AnthropicErrorReply(error=error, request_id=request_id)


def anthropic_error(request: web.Request, error: ApiError) -> web.Response:
    """With the status and headers that it has on other paths."""
    response = error_response(error)
    response.body = msgspec.json.encode(_shaped(error.problem, request[REQUEST_ID]))
    return response


def manner(request: web.Request) -> Manner:
    return Manner(b"", lambda problem: named_event(_shaped(problem, request[REQUEST_ID])))
