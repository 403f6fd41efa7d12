"""Journals in Redis: a stream for each call.

    slj:{call id}    stream  ids <owner>-<number>; h, the call's digest, in the first; i, items

Redis refuses an entry whose id is not above the last one's: a frontend from which a stream was
taken can write no more.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from slipstream.frontend.journal import Append, Found, StoreError, Written
from slipstream.runtime.redis_url import connect, is_cluster

TIMEOUT_S = 1.0

_APPEND = """
-- KEYS: journals. ARGV: ttl in ms, then for each `<id> <bytes of the head> <head><items>`. A digit
-- for each: 0 written, 1 gone, 2 fenced. Few words, both ways, cost the client less than many.
local ends = {}
for n, key in ipairs(KEYS) do
  local word = ARGV[n + 1]
  local id, length, from = string.match(word, '^(%S+) (%d+) ()')
  local head, items = string.sub(word, from, from + length - 1), string.sub(word, from + length)
  local said
  if head == '' then said = redis.pcall('XADD', key, 'NOMKSTREAM', id, 'i', items)
  else said = redis.pcall('XADD', key, id, 'h', head, 'i', items) end
  if not said then ends[n] = 1
  elseif type(said) == 'table' and said.err then
    ends[n] = string.find(said.err, 'equal or smaller', 1, true) and 2 or 1
  else
    redis.call('PEXPIRE', key, ARGV[1])
    ends[n] = 0
  end
end
return table.concat(ends)
"""

_LAST_OWNER = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if #last == 0 then return false end
local owner = tonumber(string.match(last[1][1], '^%d+'))
"""

_TAKE = f"""
-- KEYS: journal. ARGV: ttl in ms, head, owner. The taker's number and all items; nothing if it is
-- of another call.
{_LAST_OWNER}
local entries = redis.call('XRANGE', KEYS[1], '-', '+')
if entries[1][2][1] ~= 'h' or entries[1][2][2] ~= ARGV[2] then return false end
owner = math.max(owner + 1, tonumber(ARGV[3]))
redis.call('XADD', KEYS[1], owner .. '-0', 't', '')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
local packs = {{}}
for _, entry in ipairs(entries) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'i' then packs[#packs + 1] = entry[2][i + 1] end
  end
end
return {{owner, packs}}
"""

_DROP = f"""
-- KEYS: journal. ARGV: owner.
{_LAST_OWNER}
if owner == tonumber(ARGV[1]) then redis.call('UNLINK', KEYS[1]) end
return false
"""


class RedisJournal:
    """`frontend.journal.Store`. Connects when first used. ValueError: the URL is malformed."""

    def __init__(self, url: str, ttl_s: float) -> None:
        self._redis = connect(url, TIMEOUT_S)
        self._sharded = is_cluster(url)
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._append, self._take = self._script(_APPEND), self._script(_TAKE)
        self._drop = self._script(_DROP)

    async def append(self, appends: Sequence[Append]) -> list[Written]:
        """One script; on a Cluster one for each journal, at the same time."""
        parts = [[one] for one in appends] if self._sharded else [appends]
        ends = await asyncio.gather(*(self._append_part(part) for part in parts))
        return [end for part in ends for end in part]

    async def take(self, key: str, head: bytes, owner: int) -> Found | None:
        found = await self._take([_name(key)], [self._ttl_ms, head, owner])
        return None if found is None else Found(int(found[0]), found[1])

    async def drop(self, key: str, owner: int) -> None:
        await self._drop([_name(key)], [owner])

    async def close(self) -> None:
        await self._redis.aclose()

    async def _append_part(self, appends: Sequence[Append]) -> list[Written]:
        words = [
            b"%b %d %b%b" % (one.entry_id.encode(), len(one.head), one.head, one.pack)
            for one in appends
        ]
        ends = await self._append([_name(one.key) for one in appends], [self._ttl_ms, *words])
        return [Written(int(end)) for end in ends.decode()]

    def _script(self, text: str) -> Callable[[Sequence[str], Sequence[Any]], Awaitable[Any]]:
        script = self._redis.register_script(text)

        async def run(keys: Sequence[str], words: Sequence[Any]) -> Any:
            try:
                return await script(keys, words)
            except (RedisError, RedisClusterException, OSError) as error:
                raise StoreError(str(error)) from None

        return run


def _name(call_id: str) -> str:
    return f"slj:{{{call_id}}}"
