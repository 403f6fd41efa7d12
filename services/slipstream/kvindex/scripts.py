"""What Redis does in one step: the scripts of `store`, in Lua.

Epochs are compared as text, the longer one being the larger: as Lua numbers they would be rounded.
"""

_LATER = """
local function later(a, b) return #a > #b or (#a == #b and a > b) end
"""

WRITE = """
-- KEYS: w, kvw. ARGV: epoch, guarding field, its value, last_seq to set or '', ttl in ms, worker,
-- number of kvb keys that lose their entry, these keys, the keys that get one.
local at = redis.call('HMGET', KEYS[1], 'epoch', ARGV[2])
if at[1] ~= ARGV[1] or at[2] ~= ARGV[3] then return 0 end
local value, stored_from = ARGV[1] .. ':0', 8 + tonumber(ARGV[7])
for i = 8, stored_from - 1 do
  redis.call('HDEL', ARGV[i], ARGV[6])
  redis.call('SREM', KEYS[2], ARGV[i])
end
for i = stored_from, #ARGV do
  redis.call('HSET', ARGV[i], ARGV[6], value)
  redis.call('SADD', KEYS[2], ARGV[i])
end
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'last_seq', ARGV[4])
  redis.call('HDEL', KEYS[1], 'writer')
end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
"""

BEGIN = f"""
-- KEYS: w, kve. ARGV: epoch, layout, writer, ttl in ms. All epochs with entries, this one included;
-- nothing if a later epoch lives.
{_LATER}
local known = redis.call('HGET', KEYS[1], 'epoch')
if known and later(known, ARGV[1]) then return false end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'layout', ARGV[2], 'writer', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('SADD', KEYS[2], ARGV[1])
return redis.call('SMEMBERS', KEYS[2])
"""

FIND = """
-- ARGV: kvb keys. The entries of each, up to the first that has none; 0 for those that are the same
-- as the last, which spares the reader most of the work.
local found, last = {}, nil
for i, key in ipairs(ARGV) do
  local entries = redis.call('HGETALL', key)
  if #entries == 0 then break end
  local text = table.concat(entries, ' ')
  if text == last then found[i] = 0 else found[i] = entries end
  last = text
end
return found
"""

ALIVE = """
-- KEYS: w. ARGV: epoch, ttl in ms.
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
"""

FORGET = f"""
-- KEYS: w, kve. ARGV: epoch. All epochs with entries.
{_LATER}
local known = redis.call('HGET', KEYS[1], 'epoch')
if known and not later(known, ARGV[1]) then redis.call('DEL', KEYS[1]) end
return redis.call('SMEMBERS', KEYS[2])
"""

SWEEP = """
-- KEYS: w, kvw, kve. ARGV: epoch, worker, how many. 1 if there is more to do.
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then return 0 end
local keys = redis.call('SPOP', KEYS[2], ARGV[3])
local prefix = ARGV[1] .. ':'
for _, key in ipairs(keys) do
  local value = redis.call('HGET', key, ARGV[2])
  if value and string.sub(value, 1, #prefix) == prefix then
    redis.call('HDEL', key, ARGV[2])
  end
end
if #keys > 0 then return 1 end
redis.call('SREM', KEYS[3], ARGV[1])
return 0
"""
