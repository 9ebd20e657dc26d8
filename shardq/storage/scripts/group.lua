-- group: the consumer groups of one shard, and where each begins. open_group, reset_group, delete_group.
-- Model: base + delivered - foreign is the number of messages before the next one that a group gets;
-- delivered - acked - dead + replayed is what it has in hand; backlog is
-- appended + foreign - base - acked - dead + replayed - skip. So what puts a group somewhere is `base`, which counts as
-- finished; a reset backwards may leave it below 0.
-- Invariants: each function is atomic for its shard and safe to repeat. A group's position, its counters and what meta
-- says of it (for trimming, and for a full queue that drops its oldest) change together, so nothing from a new position
-- on is trimmed in between. Totals that are exported never fall: what a reset takes out of `delivered` goes to
-- `given_up`. A start is 'earliest', 'latest' or an entry id, which means the first entry at or after it; and an index,
-- which leaves out so many messages of exactly that entry. A start among trimmed entries is the first one that is left.
-- On a shard that took keys over from others the group begins with its gate shut (see reshard.lua).

local GROUP_META = {'floor:', 'last:', 'fin:', 'skip:'} -- fields of meta that a group has, its name behind them

-- How many messages lie before the entry `from`, by the first of ours from there on (another client's entries say
-- nothing), and how many behind it are missing: a full queue dropped them, or they were deleted with their whole entry.
-- Only a shard that ever lost one of these ways is read to its end for that.
local function group_count(stream, from, state)
  local at, expected, missing, size = nil, nil, 0, 1
  while not at or state.taken > 0 do
    local entries = redis.call('XRANGE', stream, from, '+', 'COUNT', size)
    if #entries == 0 then break end
    for _, entry in ipairs(entries) do
      local count, first = entry_count(entry[2])
      if first and first < state.appended then
        at, expected = at or first, expected or first
        if first > expected and missing + first - expected <= state.taken then
          missing, expected = missing + first - expected, first
        end
        if first == expected then expected = expected + count end
      end
    end
    if entries[#entries][1] == LAST_ID then break end
    from, size = '(' .. entries[#entries][1], 64
  end
  if not at then return state.appended, 0 end
  local rest = state.appended - expected
  if rest > 0 and missing + rest <= state.taken then missing = missing + rest end
  return at, missing
end

-- The first entry of a start, nil at the end; and where the start lies inside it, how many messages are left out and
-- how many it has.
local function group_first(stream, state, start, index)
  if start == 'latest' then return nil, 0, 0 end
  local entry = redis.call('XRANGE', stream, start == 'earliest' and '-' or start, '+', 'COUNT', 1)[1]
  if not entry or entry[1] ~= start or index == 0 then return entry and entry[1], 0, 0 end
  local count, at = entry_count(entry[2])
  if at and at < state.appended and index < count then return start, index, count end
  entry = redis.call('XRANGE', stream, '(' .. start, '+', 'COUNT', 1)[1]
  return entry and entry[1], 0, 0
end

-- The newest id that the stream ever gave, also when its entry is gone.
local function group_newest(stream)
  local info = redis.call('XINFO', 'STREAM', stream)
  for index = 1, #info, 2 do
    if info[index] == 'last-generated-id' then return info[index + 1] end
  end
  return '0-0'
end

-- Where a start lies: last    the entry before it (the entry itself, when the start lies inside it)
--                     floor   the first id that it needs          before   messages of ours before it
--                     missing   ones behind it that are gone      part, count   see group_first, and its entry
local function group_place(stream, state, start, index)
  local entry, part, count = group_first(stream, state, start, index)
  local place = {entry = entry, part = part, count = count}
  if entry then
    local before = redis.call('XREVRANGE', stream, '(' .. entry, '-', 'COUNT', 1)[1]
    place.last, place.floor = part > 0 and entry or before and before[1] or '0-0', entry
    place.before, place.missing = group_count(stream, entry, state)
    place.before = place.before + part
  else
    place.last = group_newest(stream)
    place.floor, place.before, place.missing = id_after(place.last), state.appended, 0
  end
  return place
end

-- One bit a message, the first in the lowest bit: the first `done` of `count` are (core/intake.py has the same).
local function group_progress(done, count)
  local packed = string.rep('\255', math.floor(done / 8))
  if done % 8 > 0 then packed = packed .. string.char(2 ^ (done % 8) - 1) end
  return packed .. string.rep('\0', math.ceil(count / 8) - #packed)
end

-- Puts the group at a place of the stream. `lease` has its counters before. Returns its backlog.
-- An entry that is left out in part goes to the pending ones, with its progress: the first owner reads those anyway.
local function group_begin(keys, group, state, place, lease)
  local stream, meta, hash = keys[1], keys[2], keys[3]
  local finished, pending = lease.acked + lease.dead - lease.replayed, place.count - place.part
  redis.call('XGROUP', 'CREATE', stream, group, place.last)
  if place.part > 0 then
    redis.call('XCLAIM', stream, group, 'owner', '0', place.entry, 'RETRYCOUNT', '0', 'FORCE', 'JUSTID')
    redis.call('HSET', hash, 'x:' .. place.entry, group_progress(place.part, place.count))
  end
  redis.call('HSET', hash, 'last', place.last, 'delivered', decimal(finished + pending),
    'base', decimal(place.before - finished + lease.foreign), 'gate', state.gate)
  redis.call('HSET', meta, 'floor:' .. group, place.floor, 'last:' .. group, place.last, 'fin:' .. group,
    decimal(place.before))
  if place.missing > 0 then
    redis.call('HSET', meta, 'skip:' .. group, decimal(place.missing))
  else
    redis.call('HDEL', meta, 'skip:' .. group)
  end
  return state.appended - place.before - place.missing
end

-- The shard as these functions need it; nil when its keys are gone, or about to go.
local function group_state(stream, meta, group)
  local values = redis.call('HMGET', meta, 'state', 'appended', 'dropped', 'erased', 'groups', 'skip:' .. group,
    'parents')
  if not values[1] or values[1] == 'removing' or redis.call('EXISTS', stream) == 0 then return nil end
  local function number(index) return natural(values[index] or '') or 0 end
  return {appended = number(2), taken = number(3) + number(4), groups = values[5] or '', skip = number(6),
    gate = (values[7] or '') ~= '' and '1' or ''}
end

-- Index of a start out of its two arguments; nil when they are no start.
local function group_index(start, index)
  if start ~= 'earliest' and start ~= 'latest' and not entry_id(start) then return nil end
  return natural(index)
end

-- Gives back what only this group held, as step does.
local function group_trim(stream, meta)
  local retains = redis.call('HMGET', meta, 'retention_ms', 'retention_bytes')
  local floor = not (retains[1] or retains[2]) and trim_floor(meta)
  if floor and floor ~= '+' then redis.call('XTRIM', stream, 'MINID', floor) end
end

-- open_group: a group that begins at a start; one that exists stays where it is.
-- KEYS   1 stream   2 meta   3 group hash   4 dead letters   5 later   6 kept
-- ARGV   1 group   then nothing for 'earliest', or   2 start   3 index
-- reply  {'CREATED', backlog} | {'EXISTS'} | {'MISSING'}
local function open_group(keys, args)
  local start = args[2] or 'earliest'
  local index = group_index(start, args[3] or '0')
  if #keys ~= 6 or (#args ~= 1 and #args ~= 3) or not index then
    return misuse('open_group takes 6 keys, a group and a start')
  end
  local state = group_state(keys[1], keys[2], args[1])
  if not state then return {'MISSING'} end
  if redis.call('EXISTS', keys[3]) == 1 then return {'EXISTS'} end
  if redis.call('EXISTS', keys[4]) == 0 then
    -- A group made and destroyed is the one way to an empty stream.
    redis.call('XGROUP', 'CREATE', keys[4], 'shardq', '0', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', keys[4], 'shardq')
  end
  redis.call('ZADD', keys[5], '0', '')
  redis.call('HSET', keys[6], '', '')
  redis.call('HSET', keys[3], 'epoch', '0', 'token', '', 'renewals', '0', 'step', '0', 'plan', '0', 'acked', '0',
    'retried', '0', 'dead', '0', 'replayed', '0', 'foreign', '0', 'lost', '0', 'given_up', '0', 'later_next', '1')
  local none = {acked = 0, dead = 0, replayed = 0, foreign = 0}
  local backlog = group_begin(keys, args[1], state, group_place(keys[1], state, start, index), none)
  redis.call('HDEL', keys[2], 'gone:' .. args[1])
  redis.call('HSET', keys[2], 'groups', state.groups == '' and args[1] or (state.groups .. ' ' .. args[1]))
  return {'CREATED', decimal(backlog)}
end

local RESET_COUNTS = {'acked', 'dead', 'replayed', 'foreign', 'delivered', 'given_up', 'lost'}

local function reset_lease(hash)
  local values = redis.call('HMGET', hash, 'epoch', 'token', 'owner', 'reset', unpack(RESET_COUNTS))
  local held = values[2] and values[2] ~= ''
  local lease = {epoch = values[1], held = held, owner = values[3] or '', reset = values[4] or ''}
  for index, name in ipairs(RESET_COUNTS) do lease[name] = whole(values[index + 4]) or 0 end
  return lease
end

-- Empties the pending entries, the progress inside them, and what was to be handled later.
local function reset_clear(keys, group)
  redis.call('XGROUP', 'DESTROY', keys[1], group)
  local progress = {}
  for _, field in ipairs(redis.call('HKEYS', keys[3])) do
    if string.sub(field, 1, 2) == 'x:' then progress[#progress + 1] = field end
  end
  for first = 1, #progress, 1000 do
    redis.call('HDEL', keys[3], unpack(progress, first, math.min(first + 999, #progress)))
  end
  redis.call('UNLINK', keys[4], keys[5])
  redis.call('ZADD', keys[4], '0', '')
  redis.call('HSET', keys[5], '', '')
end

-- reset_group: puts a group at a start. What was in hand, or waited for a retry, is given up; dead letters stay. The
-- lease is freed and its epoch rises, so an owner is fenced and takes it anew.
-- KEYS   1 stream   2 meta   3 group hash   4 later   5 kept
-- ARGV   1 group   2 a name for this request, so that a copy of it does nothing   3 '1' also when the lease is held
--        4 start   5 index   6 bell channel
-- reply  {'OK', backlog} | {'HELD', owner}: nothing was done | {'ABSENT'} no such group here | {'MISSING'}
local function reset_group(keys, args)
  local index = #args == 6 and group_index(args[4], args[5])
  if #keys ~= 5 or not index then return misuse('reset_group takes 5 keys and 6 arguments') end
  local group, state = args[1], group_state(keys[1], keys[2], args[1])
  if not state then return {'MISSING'} end
  local lease = reset_lease(keys[3])
  if not lease.epoch then return {'ABSENT'} end
  local request, answered = string.match(lease.reset, '^(.*):(%d+)$')
  if request == args[2] then return {'OK', answered} end
  if lease.held and args[3] ~= '1' then return {'HELD', lease.owner} end

  local place = group_place(keys[1], state, args[4], index)
  local in_hand = lease.delivered - (lease.acked + lease.dead - lease.replayed)
  reset_clear(keys, group)
  local backlog = decimal(group_begin(keys, group, state, place, lease))
  redis.call('HSET', keys[3], 'token', '', 'nonce', '', 'owner', '', 'heir', '', 'heir_nonce', '', 'heir_ready', '',
    'epoch', next_term(lease.epoch), 'step', '0', 'given_up', decimal(lease.given_up + in_hand),
    'lost', decimal(math.max(lease.lost + state.skip - place.missing, 0)), 'reset', args[2] .. ':' .. backlog)
  group_trim(keys[1], keys[2])
  redis.call('SPUBLISH', args[6], 'lease')
  return {'OK', backlog}
end

-- delete_group: takes a group off the shard, with all it has there, and notes in meta when ('gone:<group>'): a worker that
-- runs must tell it from a loss, after which it would open the group again.
-- KEYS   1 stream   2 meta   3 group hash   4 dead letters   5 later   6 kept
-- ARGV   1 group   2 '1' also when the lease is held   3 bell channel
-- reply  {'OK'} | {'HELD', owner}: nothing was done | {'ABSENT'} no such group here
local function delete_group(keys, args)
  if #keys ~= 6 or #args ~= 3 then return misuse('delete_group takes 6 keys and 3 arguments') end
  local lease = reset_lease(keys[3])
  if lease.held and args[2] ~= '1' then return {'HELD', lease.owner} end
  local gone = redis.call('UNLINK', keys[3], keys[4], keys[5], keys[6])
  if redis.call('EXISTS', keys[1]) == 1 then gone = gone + redis.call('XGROUP', 'DESTROY', keys[1], args[1]) end
  local state = group_state(keys[1], keys[2], args[1])
  if state then
    local fields, others = {'waiting'}, {} -- who else waits marks itself again: the bell below wakes it
    for _, name in ipairs(GROUP_META) do fields[#fields + 1] = name .. args[1] end
    redis.call('HDEL', keys[2], unpack(fields))
    for name in string.gmatch(state.groups, '%S+') do
      if name ~= args[1] then others[#others + 1] = name end
    end
    redis.call('HSET', keys[2], 'groups', table.concat(others, ' '))
    if lease.epoch then redis.call('HSET', keys[2], 'gone:' .. args[1], decimal(now_ms())) end
    group_trim(keys[1], keys[2])
  end
  if gone == 0 then return {'ABSENT'} end
  redis.call('SPUBLISH', args[3], 'lease')
  return {'OK'}
end

redis.register_function('shardq_1_open_group', guarded('shhszh', open_group))
redis.register_function{function_name='shardq_1_reset_group', callback=guarded('shhzh', reset_group), flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_delete_group', callback=guarded('shh', delete_group), flags={'allow-oom'}}
