-- schedule: what a queue sends by the clock. swap_schedule, close_ticks, open_ticks.
-- The definitions are one hash on the queue's own slot: name -> definition, '' -> a number that rises with each change.
-- What was sent stands with the messages, on the shard of the schedule's key, where append keeps the last sequence of a
-- producer: 'p:cron/<name>' = 'tick:entry:first'; closed: 'until|time-0|tick', opened by a move: 'tick:0-0:0'.
-- Invariants: a tick is the sequence that append refuses to store twice; nothing here lowers it while the shard is open
-- to the schedule, so no tick is sent again, whatever a leader that knows an old definition still tries.

-- swap_schedule: store, change or remove a definition that nobody changed meanwhile.
-- KEYS   1 schedules      ARGV   1 name   2 the definition seen, '' for none   3 the new one, '' to remove it
-- reply  {'OK'} | {'CHANGED'}   another one stands there
local function swap_schedule(keys, args)
  if #keys ~= 1 or #args ~= 3 or args[1] == '' then return misuse('swap_schedule takes 1 key and 3 arguments') end
  local stored = redis.call('HGET', keys[1], args[1]) or ''
  if stored == args[3] then return {'OK'} end -- also the second copy of a call
  if stored ~= args[2] then return {'CHANGED'} end
  if args[3] == '' then
    redis.call('HDEL', keys[1], args[1])
  else
    redis.call('HSET', keys[1], args[1], args[3])
  end
  redis.call('HSET', keys[1], '', next_term(redis.call('HGET', keys[1], '')))
  return {'OK'}
end

-- The last tick sent, the one up to which none is taken, and whether the field is closed.
local function ticks_sent(stored)
  local sequence = tonumber(string.match(stored or '0', '^%d+')) or 0
  local tick = string.match(stored or '', '^%d+|[%d%-]+|(%d+)$')
  return tick and tonumber(tick) or sequence, sequence, tick ~= nil
end

-- Why the shard's ticks are no business of the caller's; nil when they are.
local function ticks_elsewhere(meta)
  local state = redis.call('HGET', meta, 'state')
  return state ~= 'open' and {state and 'SEALED' or 'MISSING'} or nil
end

-- close_ticks: the schedule leaves this shard: no tick up to `until` is stored any more. By then no leader knows the old
-- definition, and the field may go like any idle producer's.
-- KEYS   1 meta      ARGV   1 producer   2 until, Unix s      reply  {'OK', last tick sent, '0' for none} | {'SEALED'} its
--        children took the ticks over | {'MISSING'}
local function close_ticks(keys, args)
  local limit = natural(args[2] or '')
  if #keys ~= 1 or #args ~= 2 or not limit then return misuse('close_ticks takes 1 key and 2 arguments') end
  local elsewhere = ticks_elsewhere(keys[1])
  if elsewhere then return elsewhere end
  local field = 'p:' .. args[1]
  local tick, sequence = ticks_sent(redis.call('HGET', keys[1], field))
  redis.call('HSET', keys[1], field,
    decimal(math.max(limit, sequence)) .. '|' .. decimal(now_us() / 1000) .. '-0|' .. decimal(tick))
  return {'OK', decimal(tick)}
end

-- open_ticks: the schedule comes to this shard, having sent its ticks up to one.
-- KEYS   1 meta      ARGV   1 producer   2 last tick sent, '0' for none      reply  {'OK'} | {'SEALED'} | {'MISSING'}
local function open_ticks(keys, args)
  local given = natural(args[2] or '')
  if #keys ~= 1 or #args ~= 2 or not given then return misuse('open_ticks takes 1 key and 2 arguments') end
  local elsewhere = ticks_elsewhere(keys[1])
  if elsewhere then return elsewhere end
  local field = 'p:' .. args[1]
  local tick, _, closed = ticks_sent(redis.call('HGET', keys[1], field))
  if closed or tick < given then
    redis.call('HSET', keys[1], field, decimal(math.max(tick, given)) .. ':0-0:0')
  end
  return {'OK'}
end

redis.register_function('shardq_1_swap_schedule', swap_schedule)
redis.register_function{function_name='shardq_1_close_ticks', callback=close_ticks, flags={'allow-oom'}}
redis.register_function('shardq_1_open_ticks', open_ticks)
