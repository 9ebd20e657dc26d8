-- limit: how many messages may be begun. take (a group's limit), take_keys (each key's, on the key's shard).
-- A limit is a bucket kept as GCRA keeps it: `full`, the time in us at which it is full again. A token moves it on by its
-- share of the period; it may be used from the moment `full` lies less than the bucket's depth ahead. Tokens are given
-- for moments to come, up to `ahead`, so that who waits need not ask again for each.
-- Invariants: the moments of the tokens given in any t us are at most count / period * t + capacity, whoever asks. Time
-- is this server's clock. A `full` beyond what the limit could have made (a clock that was put back, a promoted replica
-- with another one) counts as the most it could be: nobody waits for a clock. What was lost counts as a full bucket.
-- allow-oom on both: a full server must be able to drain; what they store is a number for each limit in use.

do -- a Lua chunk has room for 200 locals

local LIMIT_MAX = 1000000
local LIMIT_KEPT_US = 10000000 -- a stricter limit holds so long after it was last asked with
local LIMIT_ABSENT_US = 100000 -- when to ask again for a group whose hash is not there

-- What a limit's arguments say: {count, period, capacity}; nil when they are malformed.
local function limit_of(count, period, capacity)
  count, period, capacity = natural(count or ''), natural(period or ''), natural(capacity or '')
  if not (count and period and capacity) or count < 1 or period < 1 or capacity < 1 then return nil end
  if count > LIMIT_MAX or period > 3600000000 or capacity > LIMIT_MAX then return nil end
  return {count = count, period = period, capacity = capacity, depth = (capacity - 1) * period / count}
end

local function limit_stricter(limit, other)
  local rate, other_rate = limit.count * other.period, other.count * limit.period
  return rate < other_rate or (rate == other_rate and limit.capacity < other.capacity)
end

-- The bucket's time, put right: not before now, not later than tokens up to `ahead` could have moved it.
local function limit_base(limit, full, now, ahead)
  local furthest = now + math.ceil(ahead + limit.depth + limit.period / limit.count)
  return math.min(math.max(full, now), furthest)
end

-- How many more tokens could be given for moments up to `ahead` from now.
local function limit_free(limit, base, now, ahead)
  return math.max(0, math.floor((now + ahead + limit.depth - base) * limit.count / limit.period) + 1)
end

-- us from now until the first token that is given from `base` on may be used; not below 0 only if it is to come.
local function limit_first(limit, base, now)
  return math.ceil(base - limit.depth - now)
end

-- take: leave to begin messages, of the limit of a whole group. Asked with different limits, the strictest that was asked
-- with lately holds for all. At most half of what is free is given at a time, so that the next one finds some too.
-- KEYS   1 control hash
-- ARGV   1 count   2 period in us   3 capacity   4 us that a token is good for   5 tokens wanted   6 us ahead
-- reply  {'OK', tokens, us until the first may be used (below 0: since when), count, period, us they are good for,
--         us until it makes sense to ask again (0 when some were given)}
-- Without the hash (the group was deleted, or it was lost and its members join again) none are given and nothing is made.
local function take(keys, args)
  local limit, hold = limit_of(args[1], args[2], args[3]), natural(args[4] or '')
  local wanted, ahead = natural(args[5] or ''), natural(args[6] or '')
  if #keys ~= 1 or #args ~= 6 or not (limit and hold and wanted and ahead) then
    return misuse('take takes 1 key and 6 arguments: a limit and how much of it')
  end
  local now, state = now_us(), redis.call('HMGET', keys[1], 'limit', 'limit_full')
  if not state[1] and redis.call('EXISTS', keys[1]) == 0 then
    return {'OK', '0', '0', decimal(limit.count), decimal(limit.period), decimal(hold), decimal(LIMIT_ABSENT_US)}
  end
  local changes = {}
  local count, period, capacity, held, seen = string.match(state[1] or '', '^(%d+) (%d+) (%d+) (%d+) (%d+)$')
  local kept = limit_of(count, period, capacity)
  seen = natural(seen or '')
  held = natural(held or '')
  if kept and held and seen and math.abs(now - seen) < LIMIT_KEPT_US and limit_stricter(kept, limit) then
    limit, hold = kept, held
  else
    changes = {'limit', string.format('%.0f %.0f %.0f %.0f %.0f', limit.count, limit.period, limit.capacity, hold, now)}
  end
  local base = limit_base(limit, natural(state[2] or '') or 0, now, ahead)
  local free = limit_free(limit, base, now, ahead)
  local given = math.min(wanted, math.ceil(free / 2))
  if given > 0 then
    changes[#changes + 1] = 'limit_full'
    changes[#changes + 1] = decimal(base + math.ceil(given * limit.period / limit.count))
  end
  if #changes > 0 then redis.call('HSET', keys[1], unpack(changes)) end
  local first = limit_first(limit, base, now)
  return {'OK', decimal(given), decimal(first), decimal(limit.count), decimal(limit.period), decimal(hold),
    decimal(free > 0 and 0 or math.max(first - ahead, 1))}
end

-- take_keys: the same for keys of one shard, each with a bucket of its own.
-- KEYS   1 limits, a sorted set: tag of a key -> full. One whose bucket is full goes, the set itself when all are
-- ARGV   1 count   2 period in us   3 capacity   4 us ahead   then for each key: its tag, tokens wanted
-- reply  {'OK', for each key: tokens, us until the first may be used, us until it makes sense to ask again}
local function take_keys(keys, args)
  local limit, ahead = limit_of(args[1], args[2], args[3]), natural(args[4] or '')
  if #keys ~= 1 or not (limit and ahead) or #args % 2 ~= 0 then
    return misuse('take_keys takes 1 key, a limit, and a tag and a number for each key')
  end
  for at = 6, #args, 2 do
    if not natural(args[at]) then return misuse('take_keys takes a natural number for each key') end
  end
  local now, reply = now_us(), {'OK'}
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', decimal(now))
  for at = 5, #args, 2 do
    local full = tonumber(redis.call('ZSCORE', keys[1], args[at]) or '0') or 0
    local base = limit_base(limit, full, now, ahead)
    local given = math.min(natural(args[at + 1]), limit_free(limit, base, now, ahead))
    if given > 0 then
      redis.call('ZADD', keys[1], decimal(base + math.ceil(given * limit.period / limit.count)), args[at])
    end
    local first = limit_first(limit, base, now)
    reply[#reply + 1] = decimal(given)
    reply[#reply + 1] = decimal(first)
    reply[#reply + 1] = decimal(given > 0 and 0 or math.max(first - ahead, 1))
  end
  local last = tonumber(redis.call('ZRANGE', keys[1], -1, -1, 'WITHSCORES')[2] or '')
  if last then
    redis.call('PEXPIRE', keys[1], decimal(math.min(math.max(math.ceil((last - now) / 1000), 1), 86400000)))
  end
  return reply
end

redis.register_function{function_name='shardq_1_take', callback=guarded('h', take), flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_take_keys', callback=guarded('z', take_keys), flags={'allow-oom'}}

end
