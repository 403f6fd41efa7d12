"""The closed tables of errors: for clients HTTP status, OpenAI error type, and whether trying again
may help; for who starts a process its exit code."""

from enum import IntEnum, StrEnum
from typing import NamedTuple

import msgspec


class ErrorCode(StrEnum):
    INVALID_JSON = "invalid_json"
    INVALID_TYPE = "invalid_type"
    INVALID_VALUE = "invalid_value"
    INTEGER_BELOW = "integer_below_min_value"
    INTEGER_ABOVE = "integer_above_max_value"
    DECIMAL_BELOW = "decimal_below_min_value"
    DECIMAL_ABOVE = "decimal_above_max_value"
    STRING_BELOW = "string_below_min_length"
    STRING_ABOVE = "string_above_max_length"
    EMPTY_ARRAY = "empty_array"
    ARRAY_ABOVE = "array_above_max_length"
    MISSING_PARAMETER = "missing_required_parameter"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    UNSUPPORTED_CONTENT = "unsupported_content_type"
    INVALID_SCHEMA = "invalid_schema"
    CONTEXT_LENGTH = "context_length_exceeded"
    UNAUTHORIZED = "invalid_api_key"
    FORBIDDEN = "permission_denied"
    MODEL_NOT_FOUND = "model_not_found"
    UNKNOWN_URL = "unknown_url"
    UNSUPPORTED_ENDPOINT = "unsupported_endpoint"
    RESPONSE_NOT_FOUND = "response_not_found"
    PREVIOUS_NOT_FOUND = "previous_response_not_found"
    TRACE_NOT_FOUND = "trace_not_found"
    STREAM_NOT_FOUND = "stream_not_found"
    STREAM_TAKEN = "stream_taken"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TOO_LARGE = "request_too_large"
    UNSUPPORTED_MEDIA = "unsupported_media_type"
    RATE_LIMIT = "rate_limit_exceeded"
    QUOTA = "insufficient_quota"
    QUEUE_FULL = "queue_full"
    NOT_READY = "not_ready"
    NO_WORKER = "no_worker"
    DRAINING = "draining"
    DEADLINE = "deadline_exceeded"
    STALLED = "stream_stalled"
    MIGRATIONS = "too_many_migrations"
    QUARANTINED = "request_quarantined"
    INTERNAL = "internal_error"


class ErrorSpec(NamedTuple):
    status: int
    type: str
    retryable: bool
    meaning: str


_BAD = "invalid_request_error"
_SERVER = "server_error"

ERRORS: dict[ErrorCode, ErrorSpec] = {
    ErrorCode.INVALID_JSON: ErrorSpec(400, _BAD, False, "The body is not JSON."),
    ErrorCode.INVALID_TYPE: ErrorSpec(400, _BAD, False, "A field has the wrong JSON type."),
    ErrorCode.INVALID_VALUE: ErrorSpec(
        400, _BAD, False, "A field has a value that is none of its."
    ),
    ErrorCode.INTEGER_BELOW: ErrorSpec(400, _BAD, False, "A whole number is too small."),
    ErrorCode.INTEGER_ABOVE: ErrorSpec(400, _BAD, False, "A whole number is too large."),
    ErrorCode.DECIMAL_BELOW: ErrorSpec(400, _BAD, False, "A number is too small."),
    ErrorCode.DECIMAL_ABOVE: ErrorSpec(400, _BAD, False, "A number is too large."),
    ErrorCode.STRING_BELOW: ErrorSpec(400, _BAD, False, "A string is too short."),
    ErrorCode.STRING_ABOVE: ErrorSpec(400, _BAD, False, "A string is too long."),
    ErrorCode.EMPTY_ARRAY: ErrorSpec(400, _BAD, False, "A list is empty."),
    ErrorCode.ARRAY_ABOVE: ErrorSpec(400, _BAD, False, "A list is too long."),
    ErrorCode.MISSING_PARAMETER: ErrorSpec(400, _BAD, False, "A required field is missing."),
    ErrorCode.UNSUPPORTED_PARAMETER: ErrorSpec(400, _BAD, False, "A field has no effect here."),
    ErrorCode.UNSUPPORTED_CONTENT: ErrorSpec(400, _BAD, False, "Only text content is served."),
    ErrorCode.INVALID_SCHEMA: ErrorSpec(400, _BAD, False, "A schema or grammar is unusable."),
    ErrorCode.CONTEXT_LENGTH: ErrorSpec(400, _BAD, False, "Prompt and answer exceed the context."),
    ErrorCode.UNAUTHORIZED: ErrorSpec(401, _BAD, False, "The API key is missing or wrong."),
    ErrorCode.FORBIDDEN: ErrorSpec(403, _BAD, False, "The API key may not ask for this."),
    ErrorCode.MODEL_NOT_FOUND: ErrorSpec(404, _BAD, False, "The model is not served here."),
    ErrorCode.UNKNOWN_URL: ErrorSpec(404, _BAD, False, "No such path."),
    ErrorCode.UNSUPPORTED_ENDPOINT: ErrorSpec(404, _BAD, False, "This model generates text only."),
    ErrorCode.RESPONSE_NOT_FOUND: ErrorSpec(404, _BAD, False, "No response is kept by this id."),
    ErrorCode.PREVIOUS_NOT_FOUND: ErrorSpec(404, _BAD, False, "Nothing to go on from is kept."),
    ErrorCode.TRACE_NOT_FOUND: ErrorSpec(404, _BAD, False, "No trace is kept under this name."),
    ErrorCode.STREAM_NOT_FOUND: ErrorSpec(404, _BAD, False, "No stream of this id can go on."),
    ErrorCode.STREAM_TAKEN: ErrorSpec(409, _BAD, False, "The stream goes on at another frontend."),
    ErrorCode.METHOD_NOT_ALLOWED: ErrorSpec(405, _BAD, False, "The path has other methods."),
    ErrorCode.TOO_LARGE: ErrorSpec(413, _BAD, False, "The body is larger than the limit."),
    ErrorCode.UNSUPPORTED_MEDIA: ErrorSpec(415, _BAD, False, "Send application/json, not encoded."),
    ErrorCode.RATE_LIMIT: ErrorSpec(429, "rate_limit_error", True, "The API key has used it up."),
    ErrorCode.QUOTA: ErrorSpec(429, "insufficient_quota", False, "The API key's month is used up."),
    ErrorCode.QUEUE_FULL: ErrorSpec(429, "rate_limit_error", True, "Too many requests wait."),
    ErrorCode.NOT_READY: ErrorSpec(503, _SERVER, True, "The cluster is starting."),
    ErrorCode.NO_WORKER: ErrorSpec(503, _SERVER, True, "No worker can take the request."),
    ErrorCode.DRAINING: ErrorSpec(503, _SERVER, True, "The server is stopping."),
    ErrorCode.DEADLINE: ErrorSpec(504, _SERVER, False, "The request's time budget is used up."),
    ErrorCode.STALLED: ErrorSpec(504, _SERVER, True, "No token came for too long."),
    ErrorCode.MIGRATIONS: ErrorSpec(500, _SERVER, False, "Too many workers failed the request."),
    ErrorCode.QUARANTINED: ErrorSpec(500, _SERVER, False, "The request seems to kill workers."),
    ErrorCode.INTERNAL: ErrorSpec(500, _SERVER, True, "Something broke on our side."),
}
assert ERRORS.keys() == set(ErrorCode)


class ExitCode(IntEnum):
    """How a command ends; 128 + n after a second signal n."""

    OK = 0
    FAILED = 1
    USAGE = 2
    SETUP = 3
    MODEL = 4
    PORT = 5
    MEMORY = 6
    BUG = 70
    FAULT = 75
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]

    @property
    def is_final(self) -> bool:
        """Started again with the same settings, it would end the same way."""
        return ExitCode.USAGE <= self <= ExitCode.MEMORY


_MEANINGS = {
    ExitCode.OK: "Done; of a service: drained, or ended by the first signal.",
    ExitCode.FAILED: "Not ready in time, not drained in time, or a process that keeps crashing; "
    "an answer, a load or a check that failed.",
    ExitCode.USAGE: "The settings are wrong in themselves: an unknown command, flag or key, a "
    "value out of range, two that contradict each other; from the command line, the environment or "
    "the file.",
    ExitCode.SETUP: "The settings are sound, and cannot be had here: a folder, file or address "
    "that cannot be used, a transport or a redis-server that is not there.",
    ExitCode.MODEL: "The model is not there, broken, or not supported.",
    ExitCode.PORT: "A port or socket is in use; the line says by whom.",
    ExitCode.MEMORY: "Too little memory; the line says how much is needed.",
    ExitCode.BUG: "A bug in a machine; `slipstream serve` starts the process anew.",
    ExitCode.FAULT: "A worker whose step hangs; started anew too.",
    ExitCode.INTERRUPTED: "Ctrl-C in a command that is no service.",
}
assert _MEANINGS.keys() == set(ExitCode)


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One refusal or failure, as it travels over the bus and ends at the client."""

    code: ErrorCode
    message: str
    param: str | None = None
    retry_after_s: float | None = None
