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

-- A natural number below 2^53 out of an argument, or nil.
local function natural(text)
  local number = tonumber(text)
  if number and number >= 0 and number < 9007199254740992 and number == math.floor(number) then
    return number
  end
  return nil
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

-- Parts of an entry id.
local function id_parts(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
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
