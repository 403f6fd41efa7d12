"""`slipstream kvindex`: block events in, hints out, kept in Redis."""

from slipstream.kvindex.config import KvIndexConfig
from slipstream.kvindex.machine import KvIndexMachine, KvIndexSettings
from slipstream.kvindex.spans import KvIndexSpans
from slipstream.kvindex.store import RedisStore
from slipstream.messages import NodeInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.redis_url import require_url
from slipstream.runtime.shell import run_service
from slipstream.runtime.wall import wall_offset_ns


def run(config: KvIndexConfig) -> int:
    require_url("slipstream kvindex", config.redis_url)
    store = RedisStore(config.redis_url, config.redis_timeout_s, config.worker_ttl_s)
    node = NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=new_epoch(config),
        address=config.advertise,
        host=host_identity(),
    )
    settings = KvIndexSettings(resync_s=config.resync_s)
    machine, spans = KvIndexMachine(node, settings), KvIndexSpans(node, wall_offset_ns)
    return run_service(config, node, machine, store, spans=spans)
