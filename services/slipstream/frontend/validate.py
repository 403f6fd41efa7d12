"""The front door: what a body may say, and what the client hears if it says something else.

Every message has the value, the limit and the way out; every refusal names its member.
"""

import re
import reprlib
from collections.abc import Sized
from typing import Any, NoReturn, TypeVar

import msgspec
from aiohttp import web

from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.openai import ChatRequest, Generate, UnservedChat, UnservedCompletion
from slipstream.frontend.patience import not_ready
from slipstream.frontend.problems import ApiError, api_error

T = TypeVar("T")

LOGPROBS_MAX = 20
TIMEOUT_MAX_S = 86_400.0
SALT_CHARS_MAX = 128
DEPTH_MAX = 128
"""Of schemas."""
NAMES_SHOWN = 8
"""Of models, in a message."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    max_body_bytes: int = 8 * 2**20
    max_choices: int = 16
    max_prompts: int = 64
    max_messages: int = 10_000
    request_timeout_s: float = 600.0
    stall_timeout_s: float = 60.0


def refuse(message: str, param: str | None, code: ErrorCode = ErrorCode.INVALID_VALUE) -> NoReturn:
    raise api_error(code, message, param)


_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict = 3, 4, 4
_short.maxstring = _short.maxother = 64


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, one line, nothing unprintable."""
    if value is None or isinstance(value, bool):
        return str(msgspec.json.encode(value), "ascii")
    return _short.repr(value).encode("ascii", "backslashreplace").decode()


# --- Bodies ---------------------------------------------------------------------------------------


async def read_json(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    if request.content_type != "application/json" or "Content-Type" not in request.headers:
        given = shown(request.headers.get("Content-Type", "none"))
        refuse(
            f"Content-Type is {given}; send application/json.", None, ErrorCode.UNSUPPORTED_MEDIA
        )
    coding = request.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        refuse(
            f"Content-Encoding is {shown(coding)}; send the body as it is, not compressed.",
            None,
            ErrorCode.UNSUPPORTED_MEDIA,
        )
    return decode(decoder, await request.read())


def check_length(request: web.Request, max_body_bytes: int) -> None:
    """As it is said; one that is longer than it says ends while it is read."""
    if (request.content_length or 0) > max_body_bytes:
        raise too_large(max_body_bytes, request.content_length)


def too_large(max_body_bytes: int, length: int | None = None) -> ApiError:
    has = f"has {length} bytes" if length else "is too long"
    return api_error(
        ErrorCode.TOO_LARGE,
        f"The body {has}; the limit is {max_body_bytes} bytes. Send a shorter prompt.",
    )


_AT = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `([^`]*)`")


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """ApiError for whatever is not JSON of this type. Of repeated members the last one counts."""
    try:
        body.decode()  # what is skipped while decoding is not looked at there
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error)[:200]
        raise api_error(
            ErrorCode.INVALID_JSON, f"We could not parse the JSON body of your request: {reason}."
        ) from None
    except RecursionError:
        raise api_error(
            ErrorCode.INVALID_JSON, "The JSON body of your request is nested too deeply."
        ) from None


def _type_error(text: str) -> ApiError:
    at = _AT.search(text)
    path = at[1].partition("[...]")[0] if at else ""
    reason = (text[: at.start()] if at else text).replace("`", "")
    missing = _MISSING.match(text)
    if missing:
        name = f"{path}.{missing[1]}" if path else missing[1]
        return api_error(
            ErrorCode.MISSING_PARAMETER, f"You must provide the parameter '{name}'.", name
        )
    if not path:
        return api_error(ErrorCode.INVALID_TYPE, f"The body must be a JSON object: {reason}.")
    code = ErrorCode.INVALID_VALUE if "out of range" in reason else ErrorCode.INVALID_TYPE
    return api_error(code, f"Invalid value for '{path}': {reason[:1].lower()}{reason[1:]}.", path)


# --- Who is asked ---------------------------------------------------------------------------------


def check_ready(status: ClusterStatus) -> None:
    if status.draining:
        code, message = ErrorCode.DRAINING, "The server is stopping; send the request again."
    elif status.refuses:
        code, message = ErrorCode.NOT_READY, not_ready(status.refuses)
    else:
        return
    raise ApiError(Problem(code=code, message=message, retry_after_s=status.retry_after_s))


def check_model(model: str, status: ClusterStatus) -> None:
    if not model:
        refuse("model is empty; GET /v1/models lists what is served.", "model")
    if not status.model:
        names = ", ".join(shown(card.name) for card in status.models[:NAMES_SHOWN])
        more = ", … (GET /v1/models)" if len(status.models) > NAMES_SHOWN else ""
        refuse(
            f"The model {shown(model)} does not exist. Served here: {names}{more}.",
            "model",
            ErrorCode.MODEL_NOT_FOUND,
        )


# --- Members --------------------------------------------------------------------------------------

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "echo": (False,),
    "flat_logprobs": (False,),
    "include_reasoning": (True,),
    "spaces_between_special_tokens": (True,),
    "modalities": (["text"],),
    "suffix": ("",),
    "length_penalty": (1,),
    "detokenize": (True,),
    "documents": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
}
"""Values, beside null, that leave the answer as it is."""


def check_served(body: Generate, n: int) -> None:
    unserved = UnservedChat if isinstance(body, ChatRequest) else UnservedCompletion
    for name in unserved.__struct_fields__:
        value = getattr(body, name)
        if value is None or any(_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        if name == "best_of" and _same(value, n):
            continue
        refuse(
            f"'{name}' is not served here and was given as {shown(value)}; leave it out.",
            name,
            ErrorCode.UNSUPPORTED_PARAMETER,
        )


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) is isinstance(neutral, bool) and bool(value == neutral)


def number(name: str, value: float, low: float, high: float, above: bool = False) -> float:
    """`value`, if it lies in [low, high], or with `above` in (low, high]."""
    if low <= value <= high and not (above and value == low):
        return value
    least = f"above {low:g}" if above else f"at least {low:g}"
    code = ErrorCode.DECIMAL_ABOVE if value > high else ErrorCode.DECIMAL_BELOW
    refuse(f"{name} must be {least} and at most {high:g}, but is {shown(value)}.", name, code)


def integer(name: str, value: int, low: int, high: int) -> int:
    if low <= value <= high:
        return value
    code = ErrorCode.INTEGER_ABOVE if value > high else ErrorCode.INTEGER_BELOW
    refuse(f"{name} must be at least {low} and at most {high}, but is {shown(value)}.", name, code)


def token_id(name: str, value: int, vocab_size: int) -> int:
    highest = (vocab_size or 2**31) - 1
    if not 0 <= value <= highest:
        refuse(f"{name} has {shown(value)}; token ids are from 0 to {highest} here.", name)
    return value


def at_most(name: str, items: Sized, most: int) -> None:
    if len(items) > most:
        text = f"{name} has {len(items)} entries; at most {most} are allowed."
        refuse(text, name, ErrorCode.ARRAY_ABOVE)


def not_empty(name: str, items: Sized, way_out: str) -> None:
    if not len(items):
        refuse(f"{name} is empty; {way_out}.", name, ErrorCode.EMPTY_ARRAY)


def some_chars(name: str, text: str, most: int, what: str = "") -> None:
    """A string of 1 to `most` characters; `what`: how it is called in the message."""
    if 1 <= len(text) <= most:
        return
    code = ErrorCode.STRING_ABOVE if text else ErrorCode.STRING_BELOW
    refuse(
        f"{what or name} must have 1 to {most} characters, but {shown(text)} has {len(text)}.",
        name,
        code,
    )


def check_depth(name: str, value: Any) -> None:
    """What is nested deeper, or has longer integers, could be read here, and written by nobody
    behind us."""
    level = [value]
    for _ in range(DEPTH_MAX):
        for one in level:
            if type(one) is int and not -(2**63) <= one < 2**63:
                refuse(f"{name} has {shown(one)}, an integer of more than 64 bits.", name)
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    refuse(f"{name} is nested deeper than {DEPTH_MAX} levels.", name)


def timeout_s(request: web.Request, body: Generate, limits: Limits) -> float:
    """The least of what is asked for: whoever stands between may shorten it, and not lengthen."""
    asked = [limits.request_timeout_s] if body.timeout is None else []
    header = request.headers.get("X-Request-Timeout-Ms")
    if header is not None:
        name = "X-Request-Timeout-Ms"
        if not re.fullmatch(r"[0-9]{1,9}", header):
            refuse(f"{name} must be whole milliseconds, but is {shown(header)}.", name)
        asked = [number(name, int(header), 0, TIMEOUT_MAX_S * 1000, above=True) / 1000]
    if body.timeout is not None:
        asked.append(number("timeout", body.timeout, 0, TIMEOUT_MAX_S, above=True))
    return min(asked)


def salt(body: Generate) -> str:
    value = body.cache_salt
    if value is None:
        return ""
    if not 1 <= len(value) <= SALT_CHARS_MAX or not value.isprintable() or set("@/\\") & set(value):
        refuse(
            f"cache_salt must have 1 to {SALT_CHARS_MAX} printable characters without '@', '/' "
            f"and '\\', but is {shown(value)}.",
            "cache_salt",
        )
    return value


def stream_options(body: Generate) -> tuple[bool, bool]:
    """(usage at the end, usage in each chunk)."""
    options = body.stream_options
    if options is None:
        return False, False
    if not body.stream:
        refuse("stream_options has a meaning only with stream: true.", "stream_options")
    usage = bool(options.include_usage)
    return usage, usage and bool(options.continuous_usage_stats)
