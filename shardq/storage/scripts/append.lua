-- append: store one record batch of one producer, exactly once.
-- KEYS   1 stream   2 meta
-- ARGV   1 producer incarnation   2 its sequence for this shard (1, 2, ...)   3 messages in the batch
--        4 the batch   5 bell channel
-- reply  {'OK', entry id, number of the batch's first message in the shard}
--        {'SEALED'}          the shard takes no more messages: refresh the routing table, route again
--        {'MISSING'}         the shard was never opened here, or its keys are gone
--        {'STALE', last}     an older sequence than the last one stored: a late copy, nothing was done
-- Invariants: a sequence stored before returns its first answer and appends nothing. That path writes too, so that
-- a WAIT behind it covers the first copy. No allow-oom flag: at maxmemory appends stop and commits go on.
local function append(keys, args)
  if #keys ~= 2 or #args ~= 5 then return misuse('append takes 2 keys and 5 arguments') end
  local stream, meta = keys[1], keys[2]
  local producer, sequence, count, batch = args[1], natural(args[2]), natural(args[3]), args[4]
  local version, _, high, low = string.byte(batch, 1, 4)
  if not sequence or not count or version ~= BATCH_VERSION or not low or high * 256 + low ~= count or count == 0 then
    return misuse('append was given a batch whose header does not fit its count')
  end

  local field = 'p:' .. producer
  local state = redis.call('HMGET', meta, 'state', 'appended', 'bytes', 'waiting', field)
  if not state[1] then return {'MISSING'} end

  if state[5] then
    local last, entry, first = string.match(state[5], '^(%d+):([%d%-]+):(%d+)$')
    last = tonumber(last)
    if sequence == last then
      redis.call('HSET', meta, field, state[5])
      return {'OK', entry, first}
    elseif sequence < last then
      return {'STALE', decimal(last)}
    end
  end

  if state[1] ~= 'open' then return {'SEALED'} end -- only now: a batch stored before the seal keeps its answer

  local first = decimal(natural(state[2]) or 0)
  local entry = redis.call('XADD', stream, 'NOMKSTREAM', '*', 'at', first, 'batch', batch)
  if not entry then return {'MISSING'} end
  redis.call('HSET', meta, 'appended', decimal(first + count), 'bytes', decimal((natural(state[3]) or 0) + #batch),
    field, decimal(sequence) .. ':' .. entry .. ':' .. first)
  if state[4] then
    redis.call('HDEL', meta, 'waiting')
    redis.call('SPUBLISH', args[5], 'message')
  end
  if not state[5] and redis.call('HLEN', meta) % PRODUCERS_BEFORE_PRUNE == 0 then
    local now_ms = id_parts(entry)
    local flat = redis.call('HGETALL', meta)
    for index = 1, #flat, 2 do
      local ms = string.sub(flat[index], 1, 2) == 'p:' and tonumber(string.match(flat[index + 1], ':(%d+)%-'))
      if ms and ms + PRODUCER_IDLE_MS < now_ms then redis.call('HDEL', meta, flat[index]) end
    end
  end
  return {'OK', entry, first}
end

redis.register_function('shardq_1_append', append)
