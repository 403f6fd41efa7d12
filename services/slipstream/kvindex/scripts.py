"""What Redis does in one step: the scripts of `store`, in Lua.

Hashes come packed, 16 bytes each: one long argument costs client and server less than many short
ones. Epochs and sequence numbers are compared as text: as Lua numbers they would be rounded.
"""

_PUT = """
local function put(tier, packed)
  for from = 1, #packed, 16 * 500 do
    local words = {}
    for i = from, math.min(from + 16 * 500, #packed + 1) - 16, 16 do
      words[#words + 1] = string.sub(packed, i, i + 15)
      words[#words + 1] = tier
    end
    redis.call('HSET', KEYS[1], unpack(words))
  end
end
"""

APPLY = f"""
-- KEYS: kvw. ARGV: epoch, seq before, seq, ttl in ms, hashes that are nowhere any more, then a tier
-- and its hashes, and so on. 0, and nothing done, if this does not follow what was last applied.
{_PUT}
local at = redis.call('HMGET', KEYS[1], 'epoch', 'seq')
if at[1] ~= ARGV[1] or at[2] ~= ARGV[2] then return 0 end
for i = 1, #ARGV[5], 16 do redis.call('HDEL', KEYS[1], string.sub(ARGV[5], i, i + 15)) end
for i = 6, #ARGV, 2 do put(ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'seq', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""

FILL = f"""
-- KEYS: kvn. ARGV: tier, hashes, ttl in ms.
{_PUT}
put(ARGV[1], ARGV[2])
redis.call('HINCRBY', KEYS[1], 'bites', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""

SWAP = """
-- KEYS: kvn, kvw. ARGV: epoch, seq, ttl in ms, how many bites were put in. 0 if one was lost.
if (redis.call('HGET', KEYS[1], 'bites') or '0') ~= ARGV[4] then return 0 end
redis.call('HDEL', KEYS[1], 'bites')
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'seq', ARGV[2])
redis.call('UNLINK', KEYS[2])
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""

FIND = """
-- KEYS: a kvw for each worker. ARGV: hashes, then each worker's living epoch. For each worker how
-- many leading blocks it has, and how many of these are not in tier 0.
local packed, found = ARGV[1], {}
local count = #packed / 16
local function tier_of(key, i)
  return redis.call('HGET', key, string.sub(packed, 16 * i - 15, 16 * i))
end
local function last(key, low, high, is)
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if is(tier_of(key, middle)) then low = middle else high = middle - 1 end
  end
  return low
end
local function there(tier) return tier end
local function pooled(tier) return tier == '0' end
for i, key in ipairs(KEYS) do
  local at = redis.pcall('HMGET', key, 'epoch', string.sub(packed, 1, 16))
  local run, lower = 0, 0
  if not at.err and at[1] == ARGV[i + 1] and at[2] then
    run = last(key, 1, count, there)
    if not pooled(tier_of(key, run)) then
      lower = run - last(key, 0, run - 1, pooled)
    end
  end
  found[2 * i - 1], found[2 * i] = run, lower
end
return found
"""

ALIVE = """
-- KEYS: kvw. ARGV: epoch, seq, ttl in ms. 0 if something else is there.
local at = redis.call('HMGET', KEYS[1], 'epoch', 'seq')
if at[1] ~= ARGV[1] or at[2] ~= ARGV[2] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

FORGET = """
-- KEYS: kvw. ARGV: epoch.
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then redis.call('UNLINK', KEYS[1]) end
"""
