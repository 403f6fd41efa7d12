"""What is around it: the port, Redis, the keys of the bus, containers."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from slipstream.cli.checks_software import numbers
from slipstream.cli.checkup import Check, fail, ok, warn
from slipstream.cli.plan import redis_binary
from slipstream.cli.ready import ask
from slipstream.config import SetupError, StartError, format_bytes
from slipstream.curve import load
from slipstream.runtime.ports import require_free
from slipstream.runtime.redis_url import connect, is_cluster
from slipstream.types import Role

_REDIS_TIMEOUT_S = 3.0
_REDIS_OLDEST = (6, 2)
_COMMAND_TIMEOUT_S = 10.0
_KEY_AGE_DAYS = 180
_DAY_S = 86_400


def port(host: str, number: int) -> Check:
    name = f"port {number}"
    try:
        require_free("", "--port", host, number)
    except StartError as error:
        answer = ask(host, number)
        if answer.body is not None and answer.body.status:
            return ok(name, f"a Slipstream answers: {answer.body.status}, {answer.body.model}")
        what = str(error).removeprefix(": ").partition(";")[0]
        return fail(name, what, "--port N, or end that process")
    return ok(name, "free")


def redis(url: str, environ: Mapping[str, str]) -> Check:
    if not url:
        binary = redis_binary("redis-server", environ)
        if binary:
            return ok("redis", f"{Path(binary).name} is here; serve starts one of its own")
        out = "apt-get install redis-server, pip install 'slipstream[demo]', or --kvindex 0"
        return warn("redis", "no redis-server, and no --redis-url", out)
    way_out = "see --redis-url; without Redis there are no hits in other workers' caches"
    try:
        info = asyncio.run(_redis_info(url))
    except ValueError as error:
        return fail("redis", str(error), "--redis-url redis://host:6379/0")
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return fail("redis", f"does not answer: {reason}", way_out)
    return judged_redis(info)


async def _redis_info(url: str) -> Mapping[str, Any]:
    async with asyncio.timeout(_REDIS_TIMEOUT_S):
        async with connect(url, _REDIS_TIMEOUT_S) as client:
            if is_cluster(url):
                nodes: dict[str, Any] = await client.info(target_nodes=client.RANDOM)
                return nodes
            info: dict[str, Any] = await client.info()
            return info


def judged_redis(info: Mapping[str, Any]) -> Check:
    """By what its INFO says."""
    version, policy = str(info.get("redis_version", "0")), str(info.get("maxmemory_policy", ""))
    most = int(info.get("maxmemory", 0))
    found = f"Redis {version}, {policy}"
    if most:
        used = int(info.get("used_memory", 0))
        found += f", {format_bytes(used)} used of {format_bytes(most)}"
    if numbers(version) < _REDIS_OLDEST:
        return fail("redis", found, "6.2 or newer is needed")
    if most and policy == "noeviction":
        return warn("redis", found, "when it is full the index stands still: volatile-lru")
    if most and policy.startswith("allkeys"):
        return warn("redis", found, "when it is full, months of API keys go too: volatile-lru")
    return ok("redis", found)


def keys(folder: str) -> Iterator[Check]:
    """Each role's; as the process of that role would find them."""
    if not folder:
        yield ok("keys", "no --keys-dir: right for one host, where the bus stays inside")
        return
    ages_days = []
    for role in Role:
        try:
            load(folder, role)
        except SetupError as error:
            what, _, out = str(error).removeprefix("slipstream: --keys-dir: ").partition("; ")
            yield fail(f"keys {role}", what, out or "make them anew: slipstream keys make FOLDER")
            continue
        secret = Path(folder) / role / "secret"
        ages_days.append((time.time() - secret.stat().st_mtime) / _DAY_S)
    if not ages_days:
        return
    found = f"of {len(ages_days)} roles, {max(ages_days):.0f} days old"
    if max(ages_days) > _KEY_AGE_DAYS:
        yield warn("keys", found, "make new ones in an empty folder, and restart all with them")
    else:
        yield ok("keys", found)


def containers(environ: Mapping[str, str]) -> Check:
    name = "docker"
    docker = shutil.which("docker", path=environ.get("PATH"))
    if docker is None:
        return ok(name, "not here; only for docker compose up")
    said = []
    for words in (
        ["version", "--format", "{{.Server.Version}}"],
        ["compose", "version", "--short"],
    ):
        try:
            done = subprocess.run(
                [docker, *words],
                capture_output=True,
                text=True,
                timeout=_COMMAND_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return warn(name, str(error), "see that its daemon runs")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            out = "see that its daemon runs and you may use it" if words[0] == "version" else ""
            return warn(name, reason, out or "install the plugin docker-compose-v2")
        said.append(done.stdout.strip())
    return ok(name, f"{said[0]}, compose {said[1]}")
