-- common: what every function of the library shares. Comes first; registers nothing.
-- Invariants: a function touches only keys it was handed in KEYS; every number it stores is a decimal
-- integer (Lua would print 1.7e15); status words are the first item of every reply, errors are for misuse only.

local BATCH_VERSION = 1
local PRODUCERS_BEFORE_PRUNE = 256      -- fields in meta beyond which a new producer prunes idle ones
local PRODUCER_IDLE_MS = 3600000        -- longer than any producer's delivery deadline

local function decimal(number)
  return string.format('%.0f', number)
end

local function misuse(what)
  return redis.error_reply('SHARDQ_MISUSE ' .. what)
end

-- What is stored is not what shardq wrote: nothing was done.
local function corrupt(what)
  return redis.error_reply('SHARDQ_CORRUPT ' .. what)
end

-- A whole number between -2^53 and 2^53 out of an argument or a field, or nil: tonumber() takes 'nan' and '0x1p9' too.
local function whole(text)
  local number = type(text) == 'string' and string.find(text, '^-?%d+$') and tonumber(text)
  return number and math.abs(number) < 9007199254740992 and number or nil
end

-- A natural number below 2^53 out of an argument or a field, or nil.
local function natural(text)
  local number = whole(text)
  return number and number >= 0 and number or nil
end

-- As HINCRBY, which would end the function half done where the field holds no number: that counts as 0.
local function add(key, field, by)
  local sum = (whole(redis.call('HGET', key, field)) or 0) + by
  redis.call('HSET', key, field, decimal(sum))
  return sum
end

-- A function that first looks whether its keys have their types, by a letter each; a missing key has every type. Redis
-- itself refuses a command on a wrong type only when it comes to it, behind what was written before.
local KEY_TYPES = {s = 'stream', h = 'hash', z = 'zset'}

-- The error of the first key that has another type than its letter says, or nil.
local function wrong_type(letters, keys)
  for index = 1, math.min(#letters, #keys) do
    local wanted, found = KEY_TYPES[string.sub(letters, index, index)], redis.call('TYPE', keys[index]).ok
    if wanted and found ~= wanted and found ~= 'none' then
      return corrupt(keys[index] .. ' is a ' .. found .. ', not a ' .. wanted)
    end
  end
end

local function guarded(letters, callback)
  return function(keys, args) return wrong_type(letters, keys) or callback(keys, args) end
end

local function now_us()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- The next term of something fenced: always larger than the last one and than any that a failover rolled back.
local function next_term(last)
  return decimal(math.max((natural(last or '0') or 0) + 1, now_us()))
end

local function now_ms()
  return math.floor(now_us() / 1000)
end

local LAST_ID = '18446744073709551615-18446744073709551615'

local function u64(digits)
  return #digits < 20 or (#digits == 20 and digits <= '18446744073709551615')
end

-- The entry id itself, or nil for what is none.
local function entry_id(text)
  local ms, seq = string.match(text or '', '^(%d+)-(%d+)$')
  return ms and u64(ms) and u64(seq) and text or nil
end

-- Whether a stream can take no entry any more.
local function exhausted(stream)
  if redis.call('EXISTS', stream) == 0 then return false end
  local info = redis.call('XINFO', 'STREAM', stream)
  for index = 1, #info, 2 do
    if info[index] == 'last-generated-id' then return info[index + 1] == LAST_ID end
  end
  return false
end

-- Parts of an entry id; what is none counts as before them all.
local function id_parts(id)
  local ms, seq = string.match(id or '', '^(%d+)-(%d+)$')
  return tonumber(ms or 0), tonumber(seq or 0)
end

local function id_less(a, b)
  local a_ms, a_seq = id_parts(a)
  local b_ms, b_seq = id_parts(b)
  return a_ms < b_ms or (a_ms == b_ms and a_seq < b_seq)
end

local function id_after(id)
  local ms, seq = id_parts(id)
  return decimal(ms) .. '-' .. decimal(seq + 1)
end

-- How many messages an entry holds, and its place among the shard's messages when it looks like one of ours, else nil.
-- An entry of another client is one message. `fields` is the entry's flat field list.
local function entry_count(fields)
  if fields[1] ~= 'at' or fields[3] ~= 'batch' then
    return 1, nil
  end
  local version, _, high, low = string.byte(fields[4], 1, 4)
  if version == BATCH_VERSION and low and high * 256 + low > 0 then
    return high * 256 + low, natural(fields[2])
  end
  return 1, nil
end
