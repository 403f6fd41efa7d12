"""Sampling parameters of a body: within their ranges, or refused by name."""

import random

from slipstream.errors import ErrorCode
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.openai import Generate
from slipstream.frontend.validate import (
    LOGPROBS_MAX,
    Limits,
    at_most,
    integer,
    not_empty,
    number,
    refuse,
    shown,
    some_chars,
    token_id,
)
from slipstream.types import SamplingParams

STOP_MAX = 4
STOP_CHARS_MAX = 1000
STOP_TOKENS_MAX = 64
BIASES_MAX = 300
ALLOWED_TOKENS_MAX = 4096
BAD_WORDS_MAX = 128
BAD_WORD_CHARS_MAX = 256


def choices(n: int | None, limits: Limits) -> int:
    return 1 if n is None else integer("n", n, 1, limits.max_choices)


def wanted_tokens(
    body: Generate, newer: int | None, status: ClusterStatus, least: int = 1
) -> int | None:
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
    if wanted < least:
        refuse(
            f"{name} must be at least {least}, but is {shown(wanted)}.",
            name,
            ErrorCode.INTEGER_BELOW,
        )
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
    *,
    max_tokens: int,
    logprobs: int | None,
) -> SamplingParams:
    """Sampling parameters of the first choice; where the client says nothing, the model's."""

    def given(name: str, otherwise: float) -> float:
        value = getattr(body, name)
        return status.sampling.get(name, otherwise) if value is None else value

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
        stop_token_ids=_token_ids(
            "stop_token_ids", body.stop_token_ids, STOP_TOKENS_MAX, status.vocab_size
        ),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs(body),
        logit_bias=_logit_bias(body.logit_bias, status.vocab_size),
        allowed_token_ids=_allowed(body.allowed_token_ids, status.vocab_size),
        stop=_stop(body.stop),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=True if skip_special is None else skip_special,
    )


def prompt_logprobs(body: Generate) -> int | None:
    wanted = body.prompt_logprobs
    if wanted is None:
        return None
    if body.stream:
        refuse("prompt_logprobs are not given in a stream; leave one of them out.", "stream")
    return integer("prompt_logprobs", wanted, 0, LOGPROBS_MAX)


def bad_words(body: Generate) -> tuple[str, ...]:
    words = body.bad_words or []
    at_most("bad_words", words, BAD_WORDS_MAX)
    for word in words:
        some_chars("bad_words", word, BAD_WORD_CHARS_MAX, "A bad word")
    return tuple(words)


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    at_most("logit_bias", bias or (), BIASES_MAX)
    for name, value in (bias or {}).items():
        if not name.isascii() or not name.isdigit() or len(name) > 10:
            refuse(f"logit_bias has {shown(name)} where a token id must be.", "logit_bias")
        known = token_id("logit_bias", int(name), vocab_size)
        found[known] = number("logit_bias", value, -100, 100)
    return tuple(found.items())


def _allowed(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if ids is not None:
        not_empty("allowed_token_ids", ids, "leave it out, or nothing can be said")
    return _token_ids("allowed_token_ids", ids, ALLOWED_TOKENS_MAX, vocab_size)


def _token_ids(name: str, ids: list[int] | None, most: int, vocab_size: int) -> tuple[int, ...]:
    at_most(name, ids or (), most)
    return tuple(token_id(name, one, vocab_size) for one in ids or ())


def _seed(seed: int) -> int:
    return integer("seed", seed, -(2**63), 2**63 - 1)


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    at_most("stop", strings, STOP_MAX)
    for text in strings:
        some_chars("stop", text, STOP_CHARS_MAX, "A stop string")
    return strings
