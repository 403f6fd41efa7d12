"""The front door: what a body may say, and what the client hears if it says something else.

Every message has the value, the limit and the way out; every refusal names its member.
"""

import random
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import msgspec
from aiohttp import web

from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.openai import Generate, Unserved
from slipstream.frontend.problems import ApiError, api_error
from slipstream.types import SamplingParams

T = TypeVar("T")

STOP_MAX = 4
STOP_CHARS_MAX = 1000
STOP_TOKENS_MAX = 64
LOGPROBS_MAX = 20
TIMEOUT_MAX_S = 86_400.0
SALT_CHARS_MAX = 128


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    max_body_bytes: int = 8 * 2**20
    max_choices: int = 16
    max_prompts: int = 64
    max_messages: int = 10_000
    request_timeout_s: float = 600.0


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


async def read_json(
    request: web.Request, decoder: msgspec.json.Decoder[T], max_body_bytes: int
) -> T:
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
    if (request.content_length or 0) > max_body_bytes:
        raise too_large(max_body_bytes, request.content_length)
    return decode(decoder, await request.read())


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
    path = at[1] if at else ""
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
    elif not status.ready:
        reason = status.reason or "it is starting"
        code, message = ErrorCode.NOT_READY, f"The cluster cannot serve requests yet: {reason}."
    else:
        return
    raise ApiError(Problem(code=code, message=message, retry_after_s=status.retry_after_s))


def check_model(model: str, status: ClusterStatus) -> None:
    if not model:
        refuse("model is empty; GET /v1/models lists what is served.", "model")
    if model != status.model:
        refuse(
            f"The model {shown(model)} does not exist. Served here: {shown(status.model)}.",
            "model",
            ErrorCode.MODEL_NOT_FOUND,
        )


# --- Sampling -------------------------------------------------------------------------------------

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "length_penalty": (1,),
    "detokenize": (True,),
    "bad_words": ([],),
    "documents": ([],),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
}
"""Values, beside null, that leave the answer as it is."""


def check_served(body: Unserved, n: int) -> None:
    for name in Unserved.__struct_fields__:
        value = getattr(body, name)
        if value is None or any(_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        if name == "best_of" and _same(value, n):
            continue
        if name == "tools" and value == []:
            refuse("tools is empty; leave it out.", "tools")
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
    refuse(f"{name} must be {least} and at most {high:g}, but is {shown(value)}.", name)


def integer(name: str, value: int, low: int, high: int) -> int:
    if low <= value <= high:
        return value
    refuse(f"{name} must be at least {low} and at most {high}, but is {shown(value)}.", name)


def choices(n: int | None, limits: Limits) -> int:
    return 1 if n is None else integer("n", n, 1, limits.max_choices)


def wanted_tokens(body: Generate, newer: int | None, status: ClusterStatus) -> int | None:
    """`max_tokens` under either of its names; None if the client named none."""
    older = body.max_tokens
    if older is not None and newer is not None and older != newer:
        refuse(
            f"max_tokens is {shown(older)} and max_completion_tokens is {shown(newer)}; "
            "send one of them.",
            "max_completion_tokens",
        )
    name = "max_tokens" if newer is None else "max_completion_tokens"
    wanted = older if newer is None else newer
    if wanted is None:
        return None
    if wanted < 1:
        refuse(f"{name} must be at least 1, but is {shown(wanted)}.", name)
    if wanted >= status.max_model_len > 0:
        refuse(
            f"This model's maximum context length is {status.max_model_len} tokens, prompt "
            f"included, but {name} is {shown(wanted)}. Please ask for fewer tokens.",
            name,
            ErrorCode.CONTEXT_LENGTH,
        )
    return wanted


def sampling(
    body: Generate,
    status: ClusterStatus,
    defaults: Mapping[str, float],
    *,
    max_tokens: int,
    logprobs: int | None,
) -> SamplingParams:
    """Sampling parameters of the first choice. `defaults` stand where the client says nothing."""

    def given(name: str, otherwise: float) -> float:
        value = getattr(body, name)
        return defaults.get(name, otherwise) if value is None else value

    top_k = int(given("top_k", 0))
    min_tokens = body.min_tokens or 0
    if not 0 <= min_tokens <= max_tokens:
        refuse(
            f"min_tokens must be at least 0 and at most max_tokens ({max_tokens}), but is "
            f"{shown(min_tokens)}.",
            "min_tokens",
        )
    skip_special = body.skip_special_tokens
    return SamplingParams(
        max_tokens=max_tokens,
        seed=random.getrandbits(63) if body.seed is None else _seed(body.seed),
        temperature=number("temperature", given("temperature", 1.0), 0, 2),
        top_p=number("top_p", given("top_p", 1.0), 0, 1),
        top_k=0 if top_k == -1 else integer("top_k", top_k, 0, 2**31 - 1),
        min_p=number("min_p", given("min_p", 0.0), 0, 1),
        presence_penalty=number("presence_penalty", given("presence_penalty", 0.0), -2, 2),
        frequency_penalty=number("frequency_penalty", given("frequency_penalty", 0.0), -2, 2),
        repetition_penalty=number(
            "repetition_penalty", given("repetition_penalty", 1.0), 0, 100, above=True
        ),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=_stop_token_ids(body.stop_token_ids, status.vocab_size),
        logprobs=logprobs,
        stop=_stop(body.stop),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=True if skip_special is None else skip_special,
    )


def _seed(seed: int) -> int:
    return integer("seed", seed, -(2**63), 2**63 - 1)


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > STOP_MAX:
        refuse(f"stop has {len(strings)} strings; at most {STOP_MAX} are allowed.", "stop")
    for text in strings:
        if not 1 <= len(text) <= STOP_CHARS_MAX:
            refuse(
                f"A stop string must have 1 to {STOP_CHARS_MAX} characters, but {shown(text)} "
                f"has {len(text)}.",
                "stop",
            )
    return strings


def _stop_token_ids(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if not ids:
        return ()
    if len(ids) > STOP_TOKENS_MAX:
        refuse(
            f"stop_token_ids has {len(ids)} ids; at most {STOP_TOKENS_MAX} are allowed.",
            "stop_token_ids",
        )
    highest = (vocab_size or 2**31) - 1
    for token_id in ids:
        integer("stop_token_ids", token_id, 0, highest)
    return tuple(ids)


def timeout_s(request: web.Request, body: Generate, limits: Limits) -> float:
    header = request.headers.get("X-Request-Timeout-Ms")
    if header is not None:
        name = "X-Request-Timeout-Ms"
        if not re.fullmatch(r"[0-9]{1,9}", header):
            refuse(f"{name} must be whole milliseconds, but is {shown(header)}.", name)
        return number(name, int(header), 0, TIMEOUT_MAX_S * 1000, above=True) / 1000
    if body.timeout is not None:
        return number("timeout", body.timeout, 0, TIMEOUT_MAX_S, above=True)
    return limits.request_timeout_s


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
