-- append: store record batches of one producer, each exactly once. append, append_each.
-- Invariants: a sequence stored before returns its first answer and appends nothing. That path writes too, so that
-- a WAIT behind it covers the first copy. No allow-oom flag: at maxmemory appends stop and commits go on.
-- A producer's last answer stands in meta as 'sequence:entry:first' (append) or 'sequence|time-0|ids' (append_each).

local function append_answered(stored)
  local sequence, mark, rest = string.match(stored, '^(%d+)([:|])(.*)$')
  return tonumber(sequence), mark, rest
end

-- Messages stored, as far as the numbers say: from the first of ours on.
local function append_stored(stream, appended)
  local from, size = '-', 1
  while true do
    local entries = redis.call('XRANGE', stream, from, '+', 'COUNT', size)
    for _, entry in ipairs(entries) do
      local _, at = entry_count(entry[2])
      if at and at < appended then return appended - at end
    end
    if #entries < size or entries[#entries][1] == LAST_ID then return 0 end
    from, size = '(' .. entries[#entries][1], 64
  end
end

-- The groups as meta knows them: messages not finished yet, delayed ones included; the first entry that may be in the
-- group's hands; the last one that it got. Where there is no group: one that got nothing, of all that is stored.
local GROUP_MARKS = {'fin:', 'skip:', 'floor:', 'last:'}

local function append_groups(stream, meta, appended)
  local state = redis.call('HMGET', meta, 'groups', 'delayed')
  local groups, fields, delayed = {}, {}, natural(state[2] or '') or 0
  for name in string.gmatch(state[1] or '', '%S+') do
    groups[#groups + 1] = {name = name}
    for _, mark in ipairs(GROUP_MARKS) do fields[#fields + 1] = mark .. name end
  end
  if #groups == 0 then return {{backlog = append_stored(stream, appended) + delayed, floor = '0-0', last = '0-0'}} end
  local values = redis.call('HMGET', meta, unpack(fields))
  for index, group in ipairs(groups) do
    local finished, skip, floor, last = unpack(values, index * 4 - 3, index * 4)
    group.backlog = appended - (whole(finished) or 0) - (whole(skip) or 0) + delayed
    group.floor, group.last = entry_id(floor) or '0-0', entry_id(last) or '0-0'
  end
  return groups
end

-- Where what a group did not get yet begins, of the groups whose backlog is over `room`; nil when none is.
local function append_behind(groups, room)
  local first = nil
  for _, group in ipairs(groups) do
    if group.backlog > room and (not first or id_less(group.last, first)) then first = group.last end
  end
  return first
end

-- The last entry of those that a group may have in its hands, where this is one of them; else nil.
local function append_held(groups, id)
  local held = nil
  for _, group in ipairs(groups) do
    local has = not id_less(group.last, id) and not id_less(id, group.floor)
    if has and (not held or id_less(held, group.last)) then held = group.last end
  end
  return held
end

-- Drops the oldest entries until no group has more than `room` messages before it, nothing is left to drop, or it was
-- DROP_AT_ONCE of them (the next append goes on). What a group has in its hands is left alone, and what no group that is
-- behind would get. Entries of other clients stay: they count as backlog only once they were delivered.
local DROP_AT_ONCE = 1000

local function append_drop(stream, meta, groups, room)
  local from, dropped, skips = '0-0', 0, {}
  for _ = 1, DROP_AT_ONCE do
    local behind = append_behind(groups, room)
    if not behind then break end
    if id_less(from, behind) then from = behind end
    local entry = from ~= LAST_ID and redis.call('XRANGE', stream, '(' .. from, '+', 'COUNT', 1)[1]
    if not entry then break end
    local held, count, at = append_held(groups, entry[1]), entry_count(entry[2])
    if at and not held then
      redis.call('XDEL', stream, entry[1])
      dropped = dropped + count
      for _, group in ipairs(groups) do
        if id_less(group.last, entry[1]) then
          group.backlog = group.backlog - count
          if group.name then skips[group.name] = (skips[group.name] or 0) + count end
        end
      end
    end
    from = held or entry[1]
  end
  for name, count in pairs(skips) do add(meta, 'skip:' .. name, decimal(count)) end
  if dropped > 0 then add(meta, 'dropped', decimal(dropped)) end
end

-- The groups, where `count` more messages do not fit; nil where they do.
local function append_overfull(stream, meta, state, count)
  local most, slowest = state.max_backlog, 0
  if not most or count == 0 then return nil end
  local groups = append_groups(stream, meta, state.appended)
  for _, group in ipairs(groups) do slowest = math.max(slowest, group.backlog) end
  return slowest > 0 and slowest + count > most and groups or nil -- one batch always fits into an empty shard
end

-- Whether `count` more messages fit; makes room where the queue says that the oldest may go.
local function append_fits(stream, meta, state, count)
  local groups = append_overfull(stream, meta, state, count)
  if not groups then return true end
  if state.overflow ~= 'drop-oldest' then return false end
  append_drop(stream, meta, groups, state.max_backlog - count)
  return true
end

local function append_state(meta, field)
  local values = redis.call('HMGET', meta, 'state', 'appended', 'bytes', 'waiting', field, 'max_backlog', 'overflow')
  return {name = values[1], appended = natural(values[2] or '0') or 0, bytes = natural(values[3] or '0') or 0,
    waiting = values[4], answered = values[5], max_backlog = natural(values[6] or ''), overflow = values[7]}
end

-- Appends one batch and counts it in `state`; the caller writes the counters, once a call.
local function append_entry(stream, state, count, batch)
  local first = decimal(state.appended)
  local entry = redis.call('XADD', stream, 'NOMKSTREAM', '*', 'at', first, 'batch', batch)
  if entry then state.appended, state.bytes = state.appended + count, state.bytes + #batch end
  return entry, first
end

local function append_ring(meta, state, bell)
  if state.waiting then
    redis.call('HDEL', meta, 'waiting')
    redis.call('SPUBLISH', bell, 'message')
  end
end

-- A schedule's sequence is kept, its next tick may be a year away; what a schedule that moved on left behind ('|') goes.
local function append_prune(meta, now)
  local flat = redis.call('HGETALL', meta)
  for index = 1, #flat, 2 do
    local name, value = flat[index], flat[index + 1]
    local kept = string.sub(name, 1, 7) == 'p:cron/' and not string.find(value, '|', 1, true)
    if string.sub(name, 1, 2) == 'p:' and not kept then
      local ms = tonumber(string.match(value, '(%d+)%-%d'))
      if ms and ms + PRODUCER_IDLE_MS < now then redis.call('HDEL', meta, name) end
    elseif string.sub(name, 1, 5) == 'gone:' and (natural(value) or 0) + PRODUCER_IDLE_MS < now then
      redis.call('HDEL', meta, name) -- no worker of a group that was deleted then can run still
    end
  end
end

local function append_header(batch)
  local version, _, high, low = string.byte(batch, 1, 4)
  return version == BATCH_VERSION and low and high * 256 + low or nil
end

-- append: one batch.
-- KEYS   1 stream   2 meta
-- ARGV   1 producer incarnation   2 its sequence for this shard (1, 2, ...)   3 messages in the batch
--        4 the batch   5 bell channel
-- reply  {'OK', entry id, number of the batch's first message in the shard}
--        {'SEALED'}          the shard takes no more messages: refresh the routing table, route again
--        {'FULL', overflow}  the slowest group is max_backlog messages behind: nothing was done
--        {'MISSING'}         the shard was never opened here, or its keys are gone
--        {'STALE', last}     an older sequence than the last one stored, or one that another function stored: a late
--                            copy, nothing was done
local function append(keys, args)
  if #keys ~= 2 or #args ~= 5 then return misuse('append takes 2 keys and 5 arguments') end
  local stream, meta = keys[1], keys[2]
  local sequence, count, batch = natural(args[2]), natural(args[3]), args[4]
  if not sequence or not count or count == 0 or append_header(batch) ~= count then
    return misuse('append was given a batch whose header does not fit its count')
  end
  local field = 'p:' .. args[1]
  local state = append_state(meta, field)
  if not state.name then return {'MISSING'} end
  if state.answered then
    local last, mark, rest = append_answered(state.answered)
    if not last then return corrupt(meta .. ' holds no sequence in ' .. field) end
    if sequence == last then
      redis.call('HSET', meta, field, state.answered)
      local entry, first = string.match(rest, '^([%d%-]+):(%d+)$')
      if mark == ':' and entry then return {'OK', entry, first} end
    end
    if sequence <= last then return {'STALE', decimal(last)} end
  end
  if state.name ~= 'open' then return {'SEALED'} end -- only now: a batch stored before the seal keeps its answer
  if not append_fits(stream, meta, state, count) then return {'FULL', state.overflow or ''} end

  local entry, first = append_entry(stream, state, count, batch)
  if not entry then return {'MISSING'} end
  redis.call('HSET', meta, 'appended', decimal(state.appended), 'bytes', decimal(state.bytes),
    field, decimal(sequence) .. ':' .. entry .. ':' .. first)
  append_ring(meta, state, args[5])
  if not state.answered and redis.call('HLEN', meta) % PRODUCERS_BEFORE_PRUNE == 0 then
    append_prune(meta, (id_parts(entry)))
  end
  return {'OK', entry, first}
end

-- append_each: batches of one message, each with conditions of its own.
-- KEYS   1 stream   2 meta   3 delayed   4 expiring   5 timed
-- ARGV   1 producer incarnation   2 its sequence   3 bell channel
--        then for each message: when ('' now, 'in:<ms>' from now, 'at:<Unix ms>' by this server's clock),
--        dedupe id or '', ms to remember it, job id or '', ms to keep the job's record, that record, the batch
-- reply  {'OK', id of each message}: a stream entry's, or 'd<n>' of a delayed one; a dedupe id seen before gives the
--        first one's, as '<shard>/<id>' where another shard of the home stored that. Else as append.
local EACH = 7

-- When a message is due (0: at once), or nil for what is no time.
local function append_due(when, now)
  if when == '' then return 0 end
  local kind, number = string.match(when, '^(%l+):(%d+)$')
  local ms = natural(number or '')
  if not ms or (kind ~= 'in' and kind ~= 'at') then return nil end
  local due = kind == 'in' and now + ms or ms
  return due <= now and 0 or due
end

-- All names have equal length: what is due in the same ms stands in the set, and goes, in the order it was sent.
local DELAYED_FIRST = 1000000000000000

local function append_delayed(keys, due, batch, changes)
  -- `timed` is shared by the shards of a home: a name is given once in all of them. Older builds know meta's alone.
  local known = redis.call('HGET', keys[5], 'delayed_next')
  local number = math.max(natural(known) or 0, natural(redis.call('HGET', keys[2], 'delayed_next')) or 0) + 1
  redis.call('HSET', keys[2], 'delayed_next', decimal(number))
  local name = 'd' .. decimal(DELAYED_FIRST + number)
  redis.call('HSET', keys[5], 'delayed_next', decimal(number))
  redis.call('ZADD', keys[3], decimal(due), name)
  redis.call('HSET', keys[5], name, batch)
  add(keys[2], 'delayed', 1)
  changes.due = math.min(changes.due or due, due)
  return name
end

-- Dedupe ids are the home's, entries a shard's: what a child stored stands as '<shard>/<id>', what the home itself stored,
-- all that builds from before there were children know, as its id. Returns the shard, and its home.
local function append_place(keys)
  return string.match(keys[2], ':(%d+):meta$') or '', string.match(keys[5], ':(%d+):timed$') or ''
end

-- The id under which a message was sent before, if it is remembered still.
local function append_seen(keys, once, now)
  local id = once ~= '' and redis.call('HGET', keys[5], 'o:' .. once)
  if not id or tonumber(redis.call('ZSCORE', keys[4], 'o:' .. once) or '0') <= now then return nil end
  local own, home = append_place(keys)
  local shard, rest = string.match(id, '^(%d+)/(.+)$')
  shard, rest = shard or home, rest or id
  return shard == own and rest or shard .. '/' .. rest
end

local function append_remember(keys, once, id)
  local own, home = append_place(keys)
  redis.call('HSET', keys[5], 'o:' .. once, own == home and id or own .. '/' .. id)
end

-- Messages of the call that were not sent before.
local function append_fresh(keys, args, now)
  local fresh, named = 0, {}
  for at = 4, #args, EACH do
    local once = args[at + 1]
    if not named[once] and not append_seen(keys, once, now) then fresh = fresh + 1 end
    named[once] = once ~= ''
  end
  return fresh
end

local function append_each(keys, args)
  if #keys ~= 5 or #args < 3 + EACH or (#args - 3) % EACH ~= 0 then
    return misuse('append_each takes 5 keys and 7 arguments for each message')
  end
  local stream, meta, field, sequence = keys[1], keys[2], 'p:' .. args[1], natural(args[2])
  local now = now_ms()
  if not sequence then return misuse('append_each was given no sequence') end
  for at = 4, #args, EACH do
    if append_header(args[at + 6]) ~= 1 or not append_due(args[at], now)
      or not natural(args[at + 2]) or not natural(args[at + 4]) then
      return misuse('append_each was given a message that does not have its form')
    end
  end
  local state = append_state(meta, field)
  if not state.name then return {'MISSING'} end
  if state.answered then
    local last, mark, rest = append_answered(state.answered)
    if not last then return corrupt(meta .. ' holds no sequence in ' .. field) end
    if sequence == last then
      redis.call('HSET', meta, field, state.answered)
      local reply = {'OK'}
      for id in string.gmatch(string.match(rest, '^[%d%-]+|(.*)$') or '', '%S+') do reply[#reply + 1] = id end
      if mark == '|' then return reply end
    end
    if sequence <= last then return {'STALE', decimal(last)} end
  end
  if state.name ~= 'open' then return {'SEALED'} end
  local fresh = state.max_backlog and append_fresh(keys, args, now) or 0
  if not append_fits(stream, meta, state, fresh) then return {'FULL', state.overflow or ''} end

  local reply, changes, before = {'OK'}, {}, state.appended
  for at = 4, #args, EACH do
    local id = append_seen(keys, args[at + 1], now)
    if not id then
      local due = append_due(args[at], now)
      if due == 0 then
        id = append_entry(stream, state, 1, args[at + 6])
        if not id then return {'MISSING'} end
      else
        id = append_delayed(keys, due, args[at + 6], changes)
      end
      if args[at + 1] ~= '' then
        append_remember(keys, args[at + 1], id)
        redis.call('ZADD', keys[4], decimal(now + natural(args[at + 2])), 'o:' .. args[at + 1])
      end
      if args[at + 3] ~= '' then
        redis.call('HSET', keys[5], 'j:' .. args[at + 3], args[at + 5])
        redis.call('ZADD', keys[4], decimal(now + natural(args[at + 4])), 'j:' .. args[at + 3])
      end
    end
    reply[#reply + 1] = id
  end
  if changes.due then
    local known = natural(redis.call('HGET', meta, 'due') or '')
    if known and known <= changes.due then
      changes.due = nil
    else
      redis.call('HSET', meta, 'due', decimal(changes.due))
    end
  end
  redis.call('HSET', meta, 'appended', decimal(state.appended), 'bytes', decimal(state.bytes),
    field, decimal(sequence) .. '|' .. decimal(now) .. '-0|' .. table.concat(reply, ' ', 2))
  -- Also for what is due sooner than anything before: the owner has to know.
  if state.appended > before or changes.due then append_ring(meta, state, args[3]) end
  return reply
end

redis.register_function('shardq_1_append', append)
redis.register_function('shardq_1_append_each', guarded('shzzh', append_each))
