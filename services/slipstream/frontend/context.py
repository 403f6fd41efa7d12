"""What every handler is given: the gateway, the limits, and what is made once at the start."""

from dataclasses import dataclass

from aiohttp import web

from slipstream.errors import ErrorCode
from slipstream.frontend.audit import Audit
from slipstream.frontend.callers import Callers
from slipstream.frontend.gateway import Gateway
from slipstream.frontend.http_metrics import HttpMetrics
from slipstream.frontend.journal import Journal
from slipstream.frontend.responses_store import ResponseStore
from slipstream.frontend.sse import StreamKeeper
from slipstream.frontend.usage_sync import UsageSync
from slipstream.frontend.validate import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    gateway: Gateway
    callers: Callers
    limits: Limits
    keeper: StreamKeeper
    http: HttpMetrics
    responses: ResponseStore
    journal: Journal | None
    allow_lora_updates: bool
    usage: UsageSync | None
    """None: this frontend counts for itself."""
    audit: Audit | None
    system_fingerprint: str
    started_unix_s: int
    version: str


CONTEXT = web.AppKey("context", Context)

ERROR = web.RequestKey("error", ErrorCode)
"""Why the request was refused."""
REQUEST_ID = web.RequestKey("request_id", str)
NAMED_BY_CLIENT = web.RequestKey("named_by_client", bool)
"""Whether the client chose the id."""
