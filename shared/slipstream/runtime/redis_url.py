"""From a Redis URL to a client: one server, one behind Sentinels, or a Cluster.

    redis://  rediss://  unix://                   one server, as redis-py reads them
    redis+sentinel://host:port,host:port/name/db   the master called `name`; rediss+ for TLS
    redis+cluster://host:port,host:port            any nodes of it; rediss+ for TLS

`user:password@` before the first host is for Redis itself. Options follow `?`: those of redis-py
(`ssl_ca_certs`, `ssl_certfile`, …), and `sentinel_username`, `sentinel_password`.
"""

from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from slipstream.config import ConfigError

_EXPECTED = (
    "expected redis://, rediss:// or redis+cluster:// with host:port, "
    "redis+sentinel://host:port,host:port/name/db, or unix:///path"
)
_PORTS = {"sentinel": 26379, "cluster": 6379}


def is_cluster(url: str) -> bool:
    return url.partition("://")[0].endswith("+cluster")


def require_url(prog: str, url: str) -> None:
    """ConfigError: there is no Redis to be had by this URL, whatever runs there. Connects to
    nothing."""
    try:
        connect(url, timeout_s=1.0)
    except ValueError as error:
        raise ConfigError(f"{prog}: --redis-url: {error}") from None


def connect(url: str, timeout_s: float) -> Any:
    """A client of redis-py's; nothing is connected yet.

    ValueError if the URL is malformed; its text quotes none of it, for there may be a password.
    """
    try:
        return _client(url, timeout_s)
    except TypeError:
        raise ValueError("an option behind ? is none of redis-py's") from None


def _client(url: str, timeout_s: float) -> Any:
    # No retries: the machine knows when to ask again. A Cluster's client needs one to notice that
    # a slot is elsewhere.
    common = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "protocol": 2}
    scheme, _, rest = url.partition("://")
    base, _, kind = scheme.partition("+")
    if kind not in ("", *_PORTS) or (kind and base not in ("redis", "rediss")):
        raise ValueError(_EXPECTED)
    if not kind:
        options = _parse(url)
        if not ("host" in options or "path" in options):
            raise ValueError(_EXPECTED)
        database = urlsplit(url).path.strip("/")
        if base != "unix" and not (database or "0").isdigit():
            raise ValueError("after the host comes a database's number, as in redis://host:6379/0")
        pool = ConnectionPool(**{**common, "retry": Retry(NoBackoff(), 0), **options})
        make: Any = pool.make_connection  # redis-py gives it no types
        make()  # looks at the options, and connects to nothing
        return Redis(connection_pool=pool)
    authority, slash, path_and_query = rest.partition("/")
    if not slash:
        authority, mark, query = rest.partition("?")
        path_and_query = mark + query
    path, _, query = path_and_query.partition("?")
    user, at, hosts = authority.rpartition("@")
    places = [
        _parse(f"{base}://{user}{at}{host}/?{query}") for host in hosts.split(",") if host.strip()
    ]
    if not places or not all("host" in place for place in places):
        raise ValueError(_EXPECTED)
    addresses = [(place["host"], place.get("port", _PORTS[kind])) for place in places]
    options = {k: v for k, v in places[0].items() if k not in ("host", "port", "connection_class")}
    if base == "rediss":
        options["ssl"] = True
    if kind == "cluster":
        if path:
            raise ValueError("a Redis Cluster has one database, leave out what follows the hosts")
        nodes = [ClusterNode(host, port) for host, port in addresses]
        return RedisCluster(
            startup_nodes=nodes,
            require_full_coverage=False,
            retry=Retry(NoBackoff(), 1),
            **{**common, **options},
        )
    return _behind_sentinels(addresses, path, {**common, **options})


def _behind_sentinels(addresses: list[tuple[str, int]], path: str, options: dict[str, Any]) -> Any:
    name, _, database = path.partition("/")
    if not name or not (database or "0").isdigit():
        raise ValueError("redis+sentinel:// needs the master's name, as in host:26379/mymaster/0")
    words = ("username", "password")
    sentinel = {
        **{k: v for k, v in options.items() if k not in (*words, "db")},
        **{word: options.pop(f"sentinel_{word}", None) for word in words},
    }
    for word in words:
        sentinel.pop(f"sentinel_{word}", None)
    never = Retry(NoBackoff(), 0)
    make: Any = Sentinel  # redis-py gives it no types
    sentinels = make(addresses, sentinel_kwargs={**sentinel, "retry": never})
    return sentinels.master_for(name, **{**options, "db": int(database or 0), "retry": never})


def _parse(url: str) -> dict[str, Any]:
    try:
        options: dict[str, Any] = {**parse_url(url)}
    except ValueError:
        raise ValueError(_EXPECTED) from None
    return options
