-- timed: what happens to a shard because time passed, or because somebody said so. promote, tidy, trim.
-- Invariants: a delayed batch is in the stream or among the delayed ones, never in both and never in none. Nothing that a
-- registered group has not finished is trimmed. Both are safe to call at any time by anyone. allow-oom on tidy, which
-- only frees; not on promote, which appends.

-- The first entry that some registered group has not finished; nil when that is not known, '+' when there is no group.
-- `groups` is meta's field of that name, for who read it already.
local function trim_floor(meta, groups)
  local fields = {}
  groups = groups or redis.call('HGET', meta, 'groups') or ''
  for group in string.gmatch(groups, '%S+') do fields[#fields + 1] = 'floor:' .. group end
  if #fields == 0 then return '+' end
  local floor = nil
  local floors = redis.call('HMGET', meta, unpack(fields))
  for index = 1, #fields do
    if not entry_id(floors[index]) then return nil end
    if not floor or id_less(floors[index], floor) then floor = floors[index] end
  end
  return floor
end

-- promote: moves what is due into the stream.
-- KEYS   1 stream   2 meta   3 delayed   4 timed      ARGV   1 bell channel   2 batches to move at most
-- reply  {'OK', batches moved, ms until the next is due or ''} | {'MISSING'}
local function promote(keys, args)
  local most = natural(args[2] or '')
  if #keys ~= 4 or #args ~= 2 or not most then return misuse('promote takes 4 keys and 2 arguments') end
  local stream, meta = keys[1], keys[2]
  local state = append_state(meta, 'state')
  if not state.name then return {'MISSING'} end
  local now = now_ms()
  local due = redis.call('ZRANGEBYSCORE', keys[3], '-inf', decimal(now), 'LIMIT', 0, most)
  local moved = 0
  for _, name in ipairs(due) do
    local batch = redis.call('HGET', keys[4], name)
    if batch then
      if not append_entry(stream, state, 1, batch) then return {'MISSING'} end
      redis.call('HDEL', keys[4], name)
      moved = moved + 1
    end
    redis.call('ZREM', keys[3], name)
  end
  local following = redis.call('ZRANGE', keys[3], 0, 0, 'WITHSCORES')[2]
  following = natural(following or '')
  if following then
    redis.call('HSET', meta, 'due', decimal(following))
  else
    redis.call('HDEL', meta, 'due')
  end
  redis.call('HSET', meta, 'appended', decimal(state.appended), 'bytes', decimal(state.bytes),
    'delayed', decimal(redis.call('ZCARD', keys[3]) - 1))
  if moved > 0 then append_ring(meta, state, args[1]) end
  return {'OK', moved, following and decimal(math.max(following - now, 0)) or ''}
end

local TIDY_AT_ONCE = 1000

-- How many of the oldest entries are to go so that the stream takes at most `most` bytes, about.
local function tidy_excess(stream, most)
  local size, length = redis.call('MEMORY', 'USAGE', stream) or 0, redis.call('XLEN', stream)
  if size <= most or length == 0 then return 0 end
  return math.ceil(length * (size - most) / size)
end

-- Gives back entries below the floor: all, or as many as are too old or too much. Returns whether there are more to go.
-- By size they go by the node of about a hundred entries, or 4 kB, that Redis keeps them in: that reads none of them.
local function tidy_trim(stream, meta, retention_ms, retention_bytes, now)
  local floor = trim_floor(meta)
  if not floor then return false end
  if retention_bytes then
    local excess = tidy_excess(stream, retention_bytes)
    if excess == 0 then return false end
    local last = floor == '+' and LAST_ID or floor
    local gone = redis.call('XTRIM', stream, 'MINID', '~', last, 'LIMIT', math.min(excess, TIDY_AT_ONCE))
    return gone > 0 and excess > TIDY_AT_ONCE
  end
  if retention_ms then
    local oldest = decimal(math.max(now - retention_ms, 0)) .. '-0'
    if floor == '+' or id_less(oldest, floor) then floor = oldest end
  end
  if floor ~= '+' then redis.call('XTRIM', stream, 'MINID', floor) end
  return false
end

-- tidy: forgets what has had its time: dedupe ids, job records, idle producers, entries past their retention.
-- KEYS   1 stream   2 meta   3 expiring   4 timed      ARGV   none
-- reply  {'OK', '1' when there is more to do else '0'} | {'MISSING'}
local function tidy(keys, args)
  if #keys ~= 4 or #args ~= 0 then return misuse('tidy takes 4 keys') end
  local state = redis.call('HMGET', keys[2], 'state', 'retention_ms', 'retention_bytes')
  if not state[1] then return {'MISSING'} end
  local now = now_ms()
  local gone = redis.call('ZRANGEBYSCORE', keys[3], '-inf', decimal(now), 'LIMIT', 0, TIDY_AT_ONCE)
  if #gone > 0 then
    redis.call('HDEL', keys[4], unpack(gone))
    redis.call('ZREM', keys[3], unpack(gone))
  end
  append_prune(keys[2], now)
  local more = tidy_trim(keys[1], keys[2], natural(state[2] or ''), natural(state[3] or ''), now)
  return {'OK', (more or #gone == TIDY_AT_ONCE) and '1' or '0'}
end

-- trim: gives up what is kept of finished messages before an entry.
-- KEYS   1 stream   2 meta      ARGV   1 entry id: what is before it goes, as far as every group has finished it
-- reply  {'OK', entries that went} | {'MISSING'}
local function trim(keys, args)
  if #keys ~= 2 or #args ~= 1 or not entry_id(args[1]) then return misuse('trim takes 2 keys and an entry id') end
  if redis.call('EXISTS', keys[2]) == 0 then return {'MISSING'} end
  local floor = trim_floor(keys[2])
  if not floor then return {'OK', 0} end
  if floor == '+' or id_less(args[1], floor) then floor = args[1] end
  return {'OK', redis.call('XTRIM', keys[1], 'MINID', floor)}
end

redis.register_function('shardq_1_promote', guarded('shzh', promote))
redis.register_function{function_name='shardq_1_trim', callback=guarded('sh', trim), flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_tidy', callback=guarded('shzh', tidy), flags={'allow-oom'}}
