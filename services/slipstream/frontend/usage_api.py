"""GET /v1/usage: what a client has used, by minute, month and model; in OpenAI's words for it."""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from slipstream.errors import ErrorCode
from slipstream.frontend.callers import CALLER, Caller
from slipstream.frontend.calls import json_response
from slipstream.frontend.context import CONTEXT, Context
from slipstream.frontend.problems import api_error
from slipstream.frontend.usage import Account, Kind, Row
from slipstream.frontend.validate import shown


class UsageResult(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "usage.result"
    model: str | None
    """Null: of requests that ask for no answer, or did not get as far as naming a model."""
    num_model_requests: int
    num_refused_requests: int
    """Over the limits of the key; these are not among the others."""
    input_tokens: int
    input_cached_tokens: int
    """Of the input; known at the end of an answer."""
    output_tokens: int


class UsageBucket(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "bucket"
    period: str
    """A minute, `2026-11-22T18:05`, or a month, `2026-11`; UTC."""
    start_time: int
    end_time: int
    results: list[UsageResult]
    """One for each model."""


class UsageLimit(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """As behind `x-ratelimit-limit-`."""
    limit: int
    remaining: int
    reset_after_s: float
    """Until all of it is there."""


class KeyUsage(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "usage"
    key: str
    """The name of the API key; empty where none is asked for: everybody together."""
    limits: list[UsageLimit]
    minute: UsageBucket
    month: UsageBucket
    past_months: list[UsageBucket]
    """The newest first; those in which nothing was used are left out."""


class UsageList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    complete: bool
    """False: Redis is not there, or does not answer; what other frontends counted is as it was
    known last, and past months may be missing."""
    data: list[KeyUsage]


async def usage(request: web.Request) -> web.Response:
    """Of who asks; for operators of everybody, or of `?key=`."""
    context = request.app[CONTEXT]
    callers = _wanted(request, context)
    known = [_accounts(caller, context) for caller in callers]
    heard = context.usage is not None and await context.usage.ask(
        [account for accounts in known for account in accounts]
    )
    data = [_key(caller, accounts) for caller, accounts in zip(callers, known, strict=True)]
    response = json_response(UsageList(complete=heard, data=data))
    response.headers["Cache-Control"] = "no-store"
    return response


def _wanted(request: web.Request, context: Context) -> list[Caller]:
    asking, name = request[CALLER], request.query.get("key")
    if not asking.operator and name not in (None, asking.tenant):
        text = "Usage of other API keys takes a key with 'operator = true'."
        raise api_error(ErrorCode.FORBIDDEN, text, "key")
    if not asking.operator:
        return [asking]
    found = [one for one in context.callers.all() if name in (None, one.tenant)]
    if not found:
        text = f"There is no API key named {shown(name)}."
        raise api_error(ErrorCode.INVALID_VALUE, text, "key")
    return found


def _accounts(caller: Caller, context: Context) -> list[Account]:
    """Of this minute, of this month, of those before."""
    now_s, meter = caller.clock(), caller.meter
    now = [meter.minute(now_s), meter.month(now_s)]
    return now + context.callers.ledger.past(caller.tenant, now_s)[1:]


def _key(caller: Caller, accounts: Sequence[Account]) -> KeyUsage:
    minute, month, *past = map(_bucket, accounts)
    return KeyUsage(
        key=caller.tenant,
        limits=[
            UsageLimit(name=name, limit=limit, remaining=left, reset_after_s=round(full_s, 3))
            for name, limit, left, full_s in caller.limits(caller.clock())
        ],
        minute=minute,
        month=month,
        past_months=[bucket for bucket in past if bucket.results],
    )


def _bucket(account: Account) -> UsageBucket:
    period = account.period
    return UsageBucket(
        period=period.name,
        start_time=period.start_s,
        end_time=period.end_s,
        results=[_result(model, row) for model, row in sorted(account.rows().items())],
    )


def _result(model: str, row: Row) -> UsageResult:
    return UsageResult(
        model=model or None,
        num_model_requests=row[Kind.REQUESTS],
        num_refused_requests=row[Kind.REFUSED],
        input_tokens=row[Kind.PROMPT_TOKENS],
        input_cached_tokens=row[Kind.CACHED_TOKENS],
        output_tokens=row[Kind.COMPLETION_TOKENS],
    )
