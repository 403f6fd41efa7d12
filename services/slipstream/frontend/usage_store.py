"""Usage in Redis: a hash for each client and period.

    slu:{client}:2026-11             hash  `<frontend>.<epoch> <model>` -> five numbers, as Kind
    slu:{client}:2026-11-22T18:05    the same; lapses

Months have no time to live: with `volatile-lru`, which our own Redis runs, they are not evicted.
Each frontend removes those that are not kept, when it starts and when a month begins.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from redis.exceptions import RedisClusterException, RedisError

from slipstream.frontend.journal import StoreError
from slipstream.frontend.usage import Said, Write
from slipstream.runtime.redis_url import connect, is_cluster

TIMEOUT_S = 1.0
SCANNED = 500

_EXCHANGE = """
-- KEYS: accounts. ARGV: who writes, with a space behind; then for each packed {ttl in ms, model,
-- numbers, …}. Back: the time, and packed for each whether we had rows there, and the sum of the
-- others' by model; false for what is no hash.
local ours, told = ARGV[1], {}
for n, key in ipairs(KEYS) do
  local known = redis.pcall('HGETALL', key)
  if known.err then told[n] = false
  else
    local had, sums = false, {}
    for i = 1, #known, 2 do
      local field = known[i]
      if string.sub(field, 1, #ours) == ours then had = true
      else
        local model = string.match(field, '^%S+ (.*)$')
        if model then
          local row, at = sums[model] or {0, 0, 0, 0, 0}, 0
          for number in string.gmatch(known[i + 1], '%d+') do
            at = at + 1
            if at <= 5 then row[at] = row[at] + tonumber(number) end
          end
          sums[model] = row
        end
      end
    end
    local words = cmsgpack.unpack(ARGV[n + 1])
    for i = 2, #words, 2 do redis.call('HSET', key, ours .. words[i], words[i + 1]) end
    if #words > 1 and words[1] > 0 then redis.call('PEXPIRE', key, words[1]) end
    local pairs_ = {}
    for model, row in pairs(sums) do
      pairs_[#pairs_ + 1] = model
      for at = 1, 5 do pairs_[#pairs_ + 1] = string.format('%.0f', row[at]) end
    end
    told[n] = {had, pairs_}
  end
end
local now = redis.call('TIME')
return cmsgpack.pack({now[1], now[2], told})
"""


class Exchanged(NamedTuple):
    unix_s: float
    """By the store's clock."""
    said: Sequence[Said | None]


class UsageStore(Protocol):
    """Everything raises StoreError, and ends when it is cancelled."""

    async def exchange(self, writes: Sequence[Write]) -> Exchanged: ...

    async def forget(self, oldest: str) -> None:
        """Of months all before this one."""
        ...

    async def close(self) -> None: ...


_decode = msgspec.msgpack.Decoder(tuple[str, str, list[tuple[bool, list[str]] | bool]]).decode


class RedisUsage:
    """`UsageStore`. Connects when first used. ValueError: the URL is malformed."""

    def __init__(self, url: str, writer: str) -> None:
        """`writer`: of this process and no other, without spaces."""
        self._redis, self._writer = connect(url, TIMEOUT_S), f"{writer} "
        self._sharded = is_cluster(url)
        self._exchange = self._redis.register_script(_EXCHANGE)

    async def exchange(self, writes: Sequence[Write]) -> Exchanged:
        """One script; on a Cluster one for each account, in turn: its client has raised whatever
        came to its mind when it was first used for several things at a time."""
        parts = [[one] for one in writes] if self._sharded else [writes]
        try:
            told = [await self._part(part) for part in parts]
        except (RedisError, RedisClusterException, OSError, ValueError) as error:
            raise StoreError(str(error)) from None
        return Exchanged(told[-1].unix_s, [said for one in told for said in one.said])

    async def forget(self, oldest: str) -> None:
        """Walks through all keys, a few at a time: clients that left the file have some too."""
        try:
            async for key in self._redis.scan_iter(match="slu:*", count=SCANNED):
                period = key.decode().rpartition("}:")[2]
                if len(period) == len(oldest) and period < oldest:
                    await self._redis.unlink(key)
        except (RedisError, RedisClusterException, OSError, ValueError) as error:
            raise StoreError(str(error)) from None

    async def close(self) -> None:
        await self._redis.aclose()

    async def _part(self, writes: Sequence[Write]) -> Exchanged:
        keys = [_name(one.account.tenant, one.account.period.name) for one in writes]
        packed = await self._exchange(keys, [self._writer, *map(_words, writes)])
        seconds, micros, told = _decode(packed)
        return Exchanged(int(seconds) + int(micros) / 1e6, [_said(one) for one in told])


def _name(tenant: str, period: str) -> str:
    return f"slu:{{{tenant}}}:{period}"


def _words(write: Write) -> bytes:
    words: list[Any] = [round(write.ttl_s * 1000)]
    for model, row in write.rows.items():
        words += [model, " ".join(map(str, row))]
    return msgspec.msgpack.encode(words)


def _said(told: tuple[bool, list[str]] | bool) -> Said | None:
    if isinstance(told, bool):
        return None
    ours, words = told
    numbers = [[int(word) for word in words[at + 1 : at + 6]] for at in range(0, len(words), 6)]
    return Said(ours, dict(zip(words[::6], numbers, strict=True)))
