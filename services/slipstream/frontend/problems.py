"""Refusals and failures in OpenAI's shape, on every path."""

import math

import msgspec
from aiohttp import web

from slipstream.errors import ERRORS, ErrorCode, Problem

RETRY_AFTER_MAX_S = 60
"""OpenAI's client gives up if it is told to wait for more than 120 s."""


class ApiError(Exception):
    """Ends the handling of a request; the client gets the problem."""

    def __init__(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        super().__init__(problem.message)
        self.problem = problem
        self.headers = headers or {}


def api_error(code: ErrorCode, message: str, param: str | None = None) -> ApiError:
    return ApiError(Problem(code=code, message=message, param=param))


class _ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class _ErrorReply(msgspec.Struct, frozen=True):
    error: _ErrorBody


def error_json(problem: Problem) -> bytes:
    kind = ERRORS[problem.code].type
    return msgspec.json.encode(
        _ErrorReply(_ErrorBody(problem.message, kind, problem.param, problem.code.value))
    )


def error_response(error: ApiError) -> web.Response:
    problem = error.problem
    spec = ERRORS[problem.code]
    headers = dict(error.headers)
    if spec.status in (429, 503):
        wait_s = min(max(problem.retry_after_s or 1.0, 0.05), RETRY_AFTER_MAX_S)
        headers["Retry-After"] = str(math.ceil(wait_s))
        headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
    elif spec.status >= 500:
        headers["x-should-retry"] = "true" if spec.retryable else "false"
    if spec.status == 429 and not spec.retryable:
        headers["x-should-retry"] = "false"
    return web.Response(
        status=spec.status,
        body=error_json(problem),
        content_type="application/json",
        headers=headers,
    )
