-- step: commit what was finished since the last step and fetch what comes next, for the lease's owner only.
-- KEYS   1 stream   2 meta   3 group hash   4 dead letters (only when there are any)
-- ARGV   1 group   2 token   3 step number   4 '1' to renew the lease   5 cursor: '>' for new entries, or an entry id
--        to read the pending ones after it   6 entries to fetch at most (0: none)   7 '1' to be rung when nothing came
--        8 messages acknowledged   9 messages retried
--        then a count and that many ids of entries that are finished whole,
--        then a count and that many pairs (entry id, progress) of entries finished in part,
--        then a count and that many pairs (messages it stands for, record) of dead letters
-- reply  {'OK', heir nonce once it is ready else '', entries as XREADGROUP gives them, progress of each pending entry}
--        {'REPEAT', heir}    this step (or a later one) was applied before: nothing was applied, nothing fetched; a
--                            renewal that it asks for counts again, because the owner trusts its lease from this call on
--        {'FENCED', epoch}   the token is not the lease's: nothing was done
-- Invariants: one step number is applied once, effects and counters included, whatever was sent again. Nothing that a
-- registered group has not finished is trimmed. Expiry is not held against the owner: nobody took over.
-- allow-oom: a full server must be able to drain.

local function step_counts(args)
  local at, lists = 10, {}
  for list = 1, 3 do
    local width = list == 1 and 1 or 2
    local size = natural(args[at])
    if not size or #args < at + size * width then return nil end
    lists[list] = {first = at + 1, size = size}
    at = at + 1 + size * width
  end
  return at == #args + 1 and lists or nil
end

local function step_acknowledge(keys, args, list)
  for first = list.first, list.first + list.size - 1, 1000 do
    local last = math.min(first + 999, list.first + list.size - 1)
    redis.call('XACK', keys[1], args[1], unpack(args, first, last))
    local fields = {}
    for index = first, last do fields[#fields + 1] = 'x:' .. args[index] end
    redis.call('HDEL', keys[3], unpack(fields))
  end
end

-- Gives back the space of entries that every registered group has finished.
local function step_trim(keys, group, last_delivered)
  local pending = redis.call('XPENDING', keys[1], group)
  local floor = pending[1] > 0 and pending[2] or (last_delivered and id_after(last_delivered))
  if not floor then return end
  redis.call('HSET', keys[2], 'floor:' .. group, floor)
  local groups = redis.call('HGET', keys[2], 'groups') or ''
  for other in string.gmatch(groups, '%S+') do
    if other ~= group then
      local other_floor = redis.call('HGET', keys[2], 'floor:' .. other)
      if not other_floor then return end
      if id_less(other_floor, floor) then floor = other_floor end
    end
  end
  redis.call('XTRIM', keys[1], 'MINID', floor)
end

-- Counts what was just delivered. `foreign` are messages that did not come through append: another client's entries, and
-- forged or broken ones. Ours follow one another without a gap; and once everything there is was delivered, whatever was
-- delivered beyond what was appended is foreign, which puts right what a forged number may have upset.
local function step_count(keys, entries, all_delivered, changes, lease)
  local base, delivered = natural(lease.base) or 0, natural(lease.delivered) or 0
  local foreign = natural(lease.foreign) or 0
  for index = 1, #entries do
    local count, at = entry_count(entries[index][2])
    if at ~= base + delivered - foreign then foreign = foreign + count end
    delivered = delivered + count
  end
  if all_delivered then
    local appended = natural(redis.call('HGET', keys[2], 'appended'))
    if appended then foreign = math.max(base + delivered - appended, 0) end
  end
  if #entries > 0 then
    changes.last = entries[#entries][1]
    changes.delivered = decimal(delivered)
  end
  if decimal(foreign) ~= lease.foreign then changes.foreign = decimal(foreign) end
end

local function step_fetch(keys, args, limit, changes, lease)
  local reply = redis.call('XREADGROUP', 'GROUP', args[1], 'owner', 'COUNT', limit, 'STREAMS', keys[1], args[5])
  local entries = reply and reply[1][2] or {}
  local progress = {}
  if args[5] == '>' then
    step_count(keys, entries, #entries < limit, changes, lease)
  else
    for index = 1, #entries do
      progress[index] = redis.call('HGET', keys[3], 'x:' .. entries[index][1]) or ''
      -- An entry that someone deleted while it was pending has no fields; an array can't end in nil.
      if not entries[index][2] then entries[index][2] = {} end
    end
  end
  if #entries == 0 and args[7] == '1' and redis.call('HGET', keys[2], 'waiting') ~= '1' then
    redis.call('HSET', keys[2], 'waiting', '1')
  end
  return entries, progress
end

local STEP_FIELDS = {'token', 'step', 'epoch', 'renewals', 'heir_nonce', 'heir_ready',
  'acked', 'retried', 'dead', 'delivered', 'foreign', 'base', 'last'}

local function step(keys, args)
  if #keys < 3 or #args < 12 then return misuse('step takes 3 or 4 keys and at least 12 arguments') end
  local number, limit = natural(args[3]), natural(args[6])
  local acked, retried, lists = natural(args[8]), natural(args[9]), step_counts(args)
  if not (number and limit and acked and retried and lists) then return misuse('step was given a malformed list') end
  if lists[3].size > 0 and not keys[4] then return misuse('step needs the dead letter key for dead letters') end

  local lease, values = {}, redis.call('HMGET', keys[3], unpack(STEP_FIELDS))
  for index, name in ipairs(STEP_FIELDS) do lease[name] = values[index] end
  if not lease.token or lease.token == '' or lease.token ~= args[2] then return {'FENCED', lease.epoch or '0'} end
  local heir = lease.heir_ready == '1' and lease.heir_nonce or ''
  local renewals = args[4] == '1' and decimal((natural(lease.renewals) or 0) + 1) or nil
  if number <= (natural(lease.step) or 0) then
    if renewals then redis.call('HSET', keys[3], 'renewals', renewals) end
    return {'REPEAT', heir}
  end
  -- A gap: a failover took back steps that were answered, deliveries and acknowledgements included. What the caller holds
  -- is void: it takes its lease anew and starts from the pending entries, as any next owner does.
  if number > (natural(lease.step) or 0) + 1 then return {'FENCED', lease.epoch} end

  local changes = {step = args[3], renewals = renewals}
  local done, partial, dead = lists[1], lists[2], lists[3]
  if acked > 0 then changes.acked = decimal((natural(lease.acked) or 0) + acked) end
  if retried > 0 then changes.retried = decimal((natural(lease.retried) or 0) + retried) end
  if done.size > 0 then step_acknowledge(keys, args, done) end
  for index = partial.first, partial.first + partial.size * 2 - 1, 2 do
    redis.call('HSET', keys[3], 'x:' .. args[index], args[index + 1])
  end
  local dead_messages = 0
  for index = dead.first, dead.first + dead.size * 2 - 1, 2 do
    redis.call('XADD', keys[4], '*', 'count', args[index], 'record', args[index + 1])
    dead_messages = dead_messages + (natural(args[index]) or 1)
  end
  if dead_messages > 0 then changes.dead = decimal((natural(lease.dead) or 0) + dead_messages) end

  local entries, progress = {}, {}
  if limit > 0 then entries, progress = step_fetch(keys, args, limit, changes, lease) end
  local flat = {}
  for name, value in pairs(changes) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call('HSET', keys[3], unpack(flat))
  if done.size > 0 then step_trim(keys, args[1], changes.last or lease.last) end
  return {'OK', heir, entries, progress}
end

redis.register_function{function_name='shardq_1_step', callback=step, flags={'allow-oom'}}
