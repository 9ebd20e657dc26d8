-- reshard: the steps of changing the number of shards while the queue is in use. begin_reshard, commit_reshard,
-- end_reshard, forget_shard on the queue's own slot; open_child, seal, move_delayed, retire, remove_retired on a shard's.
-- A reshard is in place: its parents and their children lie in one slot, and share what is their home's (expiring, timed).
-- What is done, and in which order, is in runtime/reshard.py.
-- Fields: routing hash `reshard` (the plan under way), `committed` ('1' from when its parents may be sealed), `leaving:<id>`
-- (a shard that no table names any more and whose keys are still to go). A shard's meta `parents` (ids, on a child: the
-- sealed shards that held its keys), `children` (bells, on a sealed shard), `state` open, sealed or removing. Group hash
-- `gate` ('1': the group may not own the shard before it has finished its parents).
-- Invariants: each is safe to repeat. A sealed shard has children that are open; a table is published when every parent
-- is sealed; a plan is given up only when none is. A shard goes only when no group, and no producer that may ask again
-- for its answer, needs it.

-- How much a group has left to do on a shard, in messages, before it may own that shard's children; nil when it is
-- through: all is handled, nothing waits for its time, and nothing more can come. A shard that is gone is through.
local function reshard_left(meta, hash, later, group)
  local shard = redis.call('HMGET', meta, 'state', 'appended', 'delayed', 'skip:' .. group)
  if not shard[1] then return nil end
  local own = redis.call('HMGET', hash, 'epoch', 'foreign', 'base', 'acked', 'dead', 'replayed')
  local function number(text) return whole(text) or 0 end
  local delayed = number(shard[3])
  if not own[1] then return math.max(number(shard[2]) + delayed, 1) end -- it is being opened here
  local backlog = number(shard[2]) + number(own[2]) - number(own[3]) - number(own[4]) - number(own[5]) + number(own[6])
    - number(shard[4])
  local left = math.max(backlog, redis.call('ZCARD', later) - 1, 0) + delayed
  if left > 0 then return left end
  return shard[1] == 'open' and 0 or nil
end

do -- a Lua chunk has room for 200 locals

-- begin_reshard: notes a plan, unless there is one.
-- KEYS   1 routing hash      ARGV   1 plan   2 version of the table that it was made on
-- reply  {'OK'}   {'BUSY', the other plan}   {'CHANGED', version of the table there is}   {'MISSING'}
local function begin_reshard(keys, args)
  if #keys ~= 1 or #args ~= 2 or args[1] == '' or not natural(args[2]) then
    return misuse('begin_reshard takes 1 key, a plan and a version')
  end
  local stored = redis.call('HMGET', keys[1], 'version', 'reshard', 'removing')
  if not stored[1] or stored[3] then return {'MISSING'} end
  if stored[2] == args[1] then return {'OK'} end
  if stored[2] then return {'BUSY', stored[2]} end
  if stored[1] ~= args[2] then return {'CHANGED', stored[1]} end
  redis.call('HSET', keys[1], 'reshard', args[1])
  redis.call('HDEL', keys[1], 'committed')
  return {'OK'}
end

-- commit_reshard: the children are open. From here on the plan is carried out, whatever happens.
-- KEYS   1 routing hash      ARGV   1 plan      reply  {'OK'} | {'GONE'} this plan is not under way (any more)
local function commit_reshard(keys, args)
  if #keys ~= 1 or #args ~= 1 then return misuse('commit_reshard takes 1 key and a plan') end
  if redis.call('HGET', keys[1], 'reshard') ~= args[1] then return {'GONE'} end
  redis.call('HSET', keys[1], 'committed', '1')
  return {'OK'}
end

-- end_reshard: publishes the table that follows.
-- KEYS   1 routing hash
-- ARGV   1 plan   2 '1' when it is given up   3 version   4 routing table   5 ids of shards that leave, by blanks
--        then channels to ring
-- reply  {'OK'}   {'GONE'} this plan is not under way (any more)   {'HELD'} it can't be given up: it is committed
local function end_reshard(keys, args)
  if #keys ~= 1 or #args < 5 or not natural(args[3]) then return misuse('end_reshard takes 1 key and 5 or more arguments') end
  local stored = redis.call('HMGET', keys[1], 'reshard', 'committed', 'version', 'table')
  if stored[1] ~= args[1] then
    return stored[3] == args[3] and stored[4] == args[4] and {'OK'} or {'GONE'} -- also the answer to a repeated call
  end
  if args[2] == '1' and stored[2] then return {'HELD'} end
  redis.call('HSET', keys[1], 'version', args[3], 'table', args[4])
  redis.call('HDEL', keys[1], 'reshard', 'committed')
  for id in string.gmatch(args[5], '%S+') do redis.call('HSET', keys[1], 'leaving:' .. id, '1') end
  for index = 6, #args do redis.pcall('SPUBLISH', args[index], 'table') end -- some users may ring one group only
  return {'OK'}
end

-- forget_shard: publishes a table without a retired shard, whose keys go next.
-- KEYS   1 routing hash      ARGV   1 version of the table there is   2 next version   3 routing table   4 shard
-- reply  {'OK'}   {'CHANGED', version}   {'BUSY', plan} a reshard is under way   {'MISSING'}
local function forget_shard(keys, args)
  if #keys ~= 1 or #args ~= 4 or not natural(args[1]) or not natural(args[2]) or not natural(args[4]) then
    return misuse('forget_shard takes 1 key, 2 versions, a table and a shard')
  end
  local stored = redis.call('HMGET', keys[1], 'version', 'table', 'reshard')
  if not stored[1] then return {'MISSING'} end
  if stored[1] == args[2] and stored[2] == args[3] then return {'OK'} end
  if stored[3] then return {'BUSY', stored[3]} end
  if stored[1] ~= args[1] then return {'CHANGED', stored[1]} end
  redis.call('HSET', keys[1], 'version', args[2], 'table', args[3], 'leaving:' .. args[4], '1')
  return {'OK'}
end

-- open_child: an empty shard that takes over keys of others. One that exists is left alone.
-- KEYS   as open_shard      ARGV   1 ids of the shards that held its keys, by blanks   then as open_shard
-- reply  {'CREATED' | 'EXISTS'}
local function open_child(keys, args)
  if #keys ~= 5 or #args < 2 or not string.find(args[1], '^%d[%d ]*$') or not limits_sound({unpack(args, 2)}) then
    return misuse('open_child takes 5 keys, ids, a version and settings')
  end
  if redis.call('HEXISTS', keys[2], 'state') == 1 then return {'EXISTS'} end
  redis.call('HSET', keys[2], 'parents', args[1])
  return open_shard(keys, {unpack(args, 2)})
end

-- Where a schedule's ticks stand in two shards that become one: open goes before closed, and then the later tick.
local function seal_later(one, other)
  if not one then return other end
  local tick, _, closed = ticks_sent(one)
  local other_tick, _, other_closed = ticks_sent(other)
  if closed == other_closed then return other_tick > tick and other or one end
  local open, last = closed and other or one, decimal(math.max(tick, other_tick))
  return ticks_sent(open) == tonumber(last) and open or last .. ':0-0:0'
end

-- Tells the children of the ticks that the shard sent, and which of its groups were deleted when: of the workers that are
-- to learn of that some look at new shards only. A group that a child has was opened anew.
local function seal_tell(field, value, keys)
  local ticks, group = string.sub(field, 1, 7) == 'p:cron/', string.match(field, '^gone:(.+)$')
  if not ticks and not group then return end
  for child = 2, #keys do
    local known = redis.call('HGET', keys[child], field)
    if ticks then
      redis.call('HSET', keys[child], field, seal_later(known, value))
    elseif not string.find(' ' .. (redis.call('HGET', keys[child], 'groups') or '') .. ' ', ' ' .. group .. ' ', 1, true)
      and (natural(known or '') or 0) < (natural(value) or 0) then
      redis.call('HSET', keys[child], field, value)
    end
  end
end

-- seal: the shard takes no message any more; its children know the ticks that it sent, and its groups that were deleted.
-- KEYS   1 meta   then the meta of each child      ARGV   the bell of each child
-- reply  {'OK'} | {'MISSING'}
local function seal(keys, args)
  if #keys < 2 or #args ~= #keys - 1 then return misuse('seal takes a key, and a key and a channel for each child') end
  local state = redis.call('HGET', keys[1], 'state')
  if not state then return {'MISSING'} end
  if state ~= 'open' then return {'OK'} end
  local flat = redis.call('HGETALL', keys[1])
  for index = 1, #flat, 2 do seal_tell(flat[index], flat[index + 1], keys) end
  redis.call('HSET', keys[1], 'state', 'sealed', 'children', table.concat(args, ' '))
  return {'OK'}
end

local function seal_guarded(keys, args)
  return guarded(string.rep('h', #keys), function() return seal(keys, args) end)(keys, args)
end

-- What meta says of the delayed messages, out of what there is; returns how many there are.
local function delayed_tell(meta, key)
  local waiting = math.max(redis.call('ZCARD', key) - 1, 0)
  local due = natural(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2] or '')
  redis.call('HSET', meta, 'delayed', decimal(waiting))
  if due then redis.call('HSET', meta, 'due', decimal(due)) else redis.call('HDEL', meta, 'due') end
  return waiting
end

local MOVE_AT_ONCE = 500

-- move_delayed: hands messages that are not due yet to children of the sealed shard. Their bytes are the home's, they stay.
-- KEYS   1 meta   2 delayed   then of each child: meta, delayed
-- ARGV   1 channels to ring when the last one went, by blanks   then the bell of each child, then pairs: name of a
--        message, number of its child (1, 2, ...); at most 500
-- reply  {'OK', messages moved, messages left} | {'MISSING'}
local function move_delayed(keys, args)
  local children = (#keys - 2) / 2
  local first = children + 2
  if #keys < 4 or #keys % 2 ~= 0 or #args < first - 1 or (#args - first + 1) % 2 ~= 0
    or #args - first + 1 > 2 * MOVE_AT_ONCE then
    return misuse('move_delayed takes 2 keys, 2 for each child, their channels and pairs')
  end
  for at = first, #args, 2 do
    local child = natural(args[at + 1])
    if not string.find(args[at], '^d%d+$') or not child or child < 1 or child > children then
      return misuse('move_delayed was given what is no message, or no child')
    end
  end
  for at = 1, #keys, 2 do
    if redis.call('HEXISTS', keys[at], 'state') == 0 then return {'MISSING'} end
  end
  local moved = 0
  for at = first, #args, 2 do
    local due = redis.call('ZSCORE', keys[2], args[at])
    if due then
      local child = 2 * natural(args[at + 1])
      redis.call('ZREM', keys[2], args[at])
      redis.call('ZADD', keys[2 + child], due, args[at])
      moved = moved + 1
    end
  end
  for child = 1, children do
    local meta = keys[1 + 2 * child]
    delayed_tell(meta, keys[2 + 2 * child])
    if moved > 0 then append_ring(meta, {waiting = redis.call('HGET', meta, 'waiting')}, args[1 + child]) end
  end
  local left = delayed_tell(keys[1], keys[2])
  if left == 0 then
    for channel in string.gmatch(args[1], '%S+') do redis.call('SPUBLISH', channel, 'lease') end
  end
  return {'OK', moved, left}
end

local function move_guarded(keys, args)
  return guarded(string.rep('hz', #keys / 2), function() return move_delayed(keys, args) end)(keys, args)
end

-- Whether a producer's last answer is kept that it may ask for again.
local function retire_asked(meta, now)
  append_prune(meta, now)
  for _, field in ipairs(redis.call('HKEYS', meta)) do
    if string.sub(field, 1, 2) == 'p:' and string.sub(field, 1, 7) ~= 'p:cron/' then return true end
  end
  return false
end

local function retire_groups(args) return natural(args[2] or '') end

-- Why a retired shard has to stay, as the reply says it; nil when it may go.
local function retire_needed(keys, args, groups)
  for index = 1, groups do
    local hash, dead, later = keys[1 + 3 * index], keys[2 + 3 * index], keys[3 + 3 * index]
    local left = redis.call('EXISTS', hash) == 1 and reshard_left(keys[2], hash, later, args[2 + index])
    if left then return {'BUSY', 'backlog', args[2 + index], decimal(left)} end
    local letters = redis.call('XLEN', dead)
    if letters > 0 then return {'BUSY', 'dead', args[2 + index], decimal(letters)} end
  end
  local delayed = redis.call('ZCARD', keys[3]) - 1
  if delayed > 0 then return {'BUSY', 'delayed', '', decimal(delayed)} end
  local meta, now = redis.call('HMGET', keys[2], 'retention_ms', 'retention_bytes', 'deleted'), now_ms()
  tidy_trim(keys[1], keys[2], natural(meta[1] or ''), natural(meta[2] or ''), now)
  local stored = redis.call('XLEN', keys[1])
  if stored > 0 then return {'BUSY', 'stored', '', decimal(stored)} end
  if meta[3] then return {'BUSY', 'deleted', '', '0'} end
  if retire_asked(keys[2], now) then return {'BUSY', 'producers', '', '0'} end
  return nil
end

-- retire: whether nobody needs a sealed shard any more. If so, it is marked as `removing`: no group is opened, reset or
-- replayed there any more, and its descendants do not wait for it.
-- KEYS   1 stream   2 meta   3 delayed   then of each group: group hash, dead letters, later   then the meta of each
--        shard that it is named a parent of
-- ARGV   1 shard   2 number of groups   then their names
-- reply  {'OK'}   {'BUSY', why, group or '', how many}, why: open (it is not sealed), backlog (messages of a group), dead
--        (dead letters of a group), delayed (messages), stored (entries), deleted (messages whose bytes are to go),
--        producers (they may ask for an answer)   {'CHANGED'} other groups are registered   {'MISSING'}
local function retire(keys, args)
  local groups = retire_groups(args)
  if not groups or not natural(args[1]) or #args ~= groups + 2 or #keys < 3 + 3 * groups then
    return misuse('retire takes 3 keys, 3 for each group, a shard, a number and names')
  end
  local meta = redis.call('HMGET', keys[2], 'state', 'groups')
  if not meta[1] then return {'MISSING'} end
  if meta[1] == 'open' then return {'BUSY', 'open', '', '0'} end
  if meta[1] ~= 'removing' then
    local named = {}
    for index = 3, #args do named[args[index]] = true end
    for name in string.gmatch(meta[2] or '', '%S+') do
      if not named[name] then return {'CHANGED'} end
    end
    local needed = retire_needed(keys, args, groups)
    if needed then return needed end
    redis.call('HSET', keys[2], 'state', 'removing')
  end
  for index = 4 + 3 * groups, #keys do
    local parents = redis.call('HGET', keys[index], 'parents')
    if parents then
      local rest = {}
      for id in string.gmatch(parents, '%S+') do
        if id ~= args[1] then rest[#rest + 1] = id end
      end
      redis.call('HSET', keys[index], 'parents', table.concat(rest, ' '))
    end
  end
  return {'OK'}
end

local function retire_guarded(keys, args)
  local groups = math.min(retire_groups(args) or 0, #keys)
  return guarded('shz' .. string.rep('hsz', groups) .. string.rep('h', #keys), function() return retire(keys, args) end)(keys, args)
end

-- remove_retired: deletes the keys of a shard that retire let go, or of a child whose plan was given up. What is its
-- home's stays, and what handlers keep there.
-- KEYS   1 stream   2 meta   3 delayed   then for each group: group hash, dead letters, later, kept
-- ARGV   1 '1' for a child that no table ever named   2 bell   then the groups' names
-- reply  {'OK'}   {'BUSY'} it is in use: nothing was done   {'CHANGED'} other groups are registered: nothing was done
--        {'ABSENT'} there was nothing
local function remove_retired(keys, args)
  if #args < 2 or #keys ~= 3 + 4 * (#args - 2) then return misuse('remove_retired takes 3 keys and 4 for each group') end
  local meta, named = redis.call('HMGET', keys[2], 'state', 'groups', 'appended', 'delayed'), {}
  for index = 3, #args do named[args[index]] = true end
  for name in string.gmatch(meta[2] or '', '%S+') do
    if not named[name] then return {'CHANGED'} end
  end
  local unused = args[1] == '1' and meta[1] == 'open' and (meta[3] or '0') == '0' and (meta[4] or '0') == '0'
  if meta[1] and meta[1] ~= 'removing' and not unused then return {'BUSY'} end
  local gone = 0
  for _, key in ipairs(keys) do gone = gone + redis.call('UNLINK', key) end
  if gone == 0 then return {'ABSENT'} end
  redis.call('SPUBLISH', args[2], 'lease')
  return {'OK'}
end

redis.register_function('shardq_1_begin_reshard', begin_reshard)
redis.register_function{function_name='shardq_1_commit_reshard', callback=commit_reshard, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_end_reshard', callback=end_reshard, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_forget_shard', callback=forget_shard, flags={'allow-oom'}}
redis.register_function('shardq_1_open_child', guarded('shzzh', open_child))
redis.register_function{function_name='shardq_1_seal', callback=seal_guarded, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_move_delayed', callback=move_guarded, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_retire', callback=retire_guarded, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_remove_retired', callback=remove_retired, flags={'allow-oom'}}
end
