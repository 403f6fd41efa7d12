"""`slipstream frontend`."""

import math

from slipstream.frontend.app import AppSettings, Books
from slipstream.frontend.audit import Audit
from slipstream.frontend.config import FrontendConfig
from slipstream.frontend.journal import Journal
from slipstream.frontend.journal_store import RedisJournal
from slipstream.frontend.machine import FrontendMachine
from slipstream.frontend.service import FrontendService
from slipstream.frontend.settings import FrontendSettings
from slipstream.frontend.spans import FrontendSpans
from slipstream.frontend.usage_store import RedisUsage
from slipstream.frontend.validate import Limits
from slipstream.messages import NodeInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.redis_url import require_url
from slipstream.runtime.shell import run_service
from slipstream.runtime.wall import wall_offset_ns

CUT_S = 3.0
"""For the clients of requests that the end of the drain has cut to read why."""


def run(config: FrontendConfig) -> int:
    """Serves HTTP until it is drained; the exit code.

    StartError: 2 for a malformed URL of Redis, 3 for an unusable file of API keys or of routes, or
    audit log, 5 for a port that is taken.
    """
    node = NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=new_epoch(config),
        address=config.advertise,
        host=host_identity(),
    )
    settings = FrontendSettings(
        max_requests=config.max_requests,
        recovery_wait_s=config.recovery_wait_s,
        drain_timeout_s=config.drain_timeout_s,
    )
    machine = FrontendMachine(node, settings)
    if config.redis_url:
        require_url("slipstream frontend", config.redis_url)
    app = AppSettings(
        limits=Limits(
            max_body_bytes=config.max_body_bytes,
            max_choices=config.max_choices,
            request_timeout_s=config.request_timeout_s,
            stall_timeout_s=config.stall_timeout_s or math.inf,
        ),
        routes_file=config.routes_file,
        allow_lora_updates=config.allow_lora_updates,
        keep_alive_s=config.keep_alive_s,
        response_store_bytes=config.response_store_bytes,
        response_keep_s=config.response_keep_s,
        api_keys_file=config.api_keys_file,
    )
    books = Books(
        _journal(config),
        RedisUsage(config.redis_url, f"{node.node_id}.{node.epoch}") if config.redis_url else None,
        Audit(config.audit_log, node.node_id) if config.audit_log else None,
    )
    service = FrontendService(machine, app, config.host, config.port, books)
    limit_s = config.drain_timeout_s + CUT_S
    spans = FrontendSpans(node, wall_offset_ns)
    return run_service(config, node, machine, service, drain_timeout_s=limit_s, spans=spans)


def _journal(config: FrontendConfig) -> Journal | None:
    if not (config.redis_url and config.journal_ttl_s):
        return None
    store = RedisJournal(config.redis_url, config.journal_ttl_s)
    return Journal(store, config.journal_ttl_s)
