-- step: commit what was finished since the last step and fetch what comes next, for the lease's owner only.
-- KEYS   1 stream   2 meta   3 group hash; when there is more to do than finish and fetch entries: 4 dead letters
--        5 later   6 kept   7 expiring   8 timed, then the keys of effects
-- ARGV   1 group   2 token   3 step number   4 '1' to renew the lease   5 cursor: '>' for new entries, an entry id to
--        read the pending ones after it, or an entry id and '>' for those and, where that was all, new ones behind them
--        6 entries to fetch at most (0: none); the first so many where a room is given
--        7 '1' to be rung when there is no more (without a room: when nothing came)
--        8 messages acknowledged   9 messages retried   10 items of `later` known up to this id
--        then sections, each at most once: a name, a count, and that many items of
--          done     entry finished whole
--          part     entry finished in part, its progress
--          dead     messages it stands for, dead letter
--          put      item of `later` it replaces or '0', ms until it is due, times it was fetched, tag of its key, record
--          drop     item of `later` that is finished
--          get      item of `later` whose record is wanted
--          untouched  entry that was delivered and not handled: its delivery does not count
--          unget    item of `later` that was fetched and not handled: the same
--          seen     version of the marks of deleted messages that the caller knows
--          room     entries, messages and bytes to fetch: new ones are read on until about so much of any is there. With a
--                   cursor of both kinds nothing is read while there are items of `later` above the known ones
--          job      job id, ms to keep its record, the record
--          effect   see effect.lua
-- reply  {'OK', heir nonce once it is ready else '', entries as XREADGROUP gives them,
--         for each pending entry 'times delivered:progress', next item id of `later`, ms until a delayed message is due
--         or '', version of the marks of deleted messages or '', server time in ms, items of `later` above the known ones
--         (at most 1000), for each item of get its record or ''; and where a room is given what may be left: 'pending'
--         entries, 'new' ones, or '' when that was all there is}. The server time is 0 where nothing depends on it.
--        {'REPEAT', heir}    this step (or a later one) was applied before: nothing was applied, nothing fetched; a
--                            renewal that it asks for counts again, because the owner trusts its lease from this call on
--        {'FENCED', epoch}   the token is not the lease's: nothing was done
--        {'EFFECT', number, why}   Redis refused the effect of that number: the step's number is used up (sent again, the
--                            step gets this answer again), a renewal it asked for counts, and nothing else was done
--        {'FULL', number}    the same for a message sent to a queue that is full; the number is not used up
-- Invariants: one step number is applied once, effects and counters included, whatever was sent again. Nothing that a
-- registered group has not finished is trimmed. Expiry is not held against the owner: nobody took over.
-- allow-oom: a full server must be able to drain.

local STEP_WIDTH = {done = 1, part = 2, dead = 2, put = 5, drop = 1, get = 1, untouched = 1, unget = 1, seen = 1,
  job = 3, room = 3}
local STEP_SMALL = {done = true, part = true, untouched = true, seen = true, room = true} -- for which three keys are enough
local STEP_PAGE = 1000
local STEP_KEYS = 'shhszhzh'

local function step_item(text) return string.find(text, '^[1-9]%d*$') and natural(text) end
local function step_put(text) return text == '0' or step_item(text) end

-- What the parts of an item must be, by their place; others may be anything.
local STEP_FORM = {done = {entry_id}, part = {entry_id}, dead = {natural}, put = {step_put, natural, natural},
  drop = {step_item}, get = {step_item}, untouched = {entry_id}, unget = {step_item}, seen = {}, job = {[2] = natural},
  room = {natural, natural, natural}}
local STEP_ABSENT = {first = 0, size = 0}

local function step_sound(args, name, first, size)
  local width, form = STEP_WIDTH[name], STEP_FORM[name]
  if first + size * width - 1 > #args then return false end
  for at = first, first + size * width - 1, width do
    for place, check in pairs(form) do
      if not check(args[at + place - 1]) then return false end
    end
  end
  return true
end

-- Where each section begins and how many items it has; nil when the arguments are not well formed.
local function step_sections(keys, args)
  local none = STEP_ABSENT
  local sections, at = {done = none, part = none, dead = none, put = none, drop = none, get = none, untouched = none,
    unget = none, seen = none, job = none, room = none, effect = none}, 11
  while at <= #args do
    local name, size = args[at], natural(args[at + 1] or '')
    if not sections[name] or sections[name].first > 0 or not size then return nil end
    if #keys < 8 and not STEP_SMALL[name] then return nil end
    sections[name] = {first = at + 2, size = size}
    if name == 'effect' then
      at = effect_end(keys, args, at + 2, size)
      if not at then return nil end
    else
      if not step_sound(args, name, at + 2, size) then return nil end
      at = at + 2 + size * STEP_WIDTH[name]
    end
  end
  return sections
end

-- Whether every item that is to be replaced is one that was given a number.
local function step_known(args, put, next_item)
  for at = put.first, put.first + put.size * 5 - 1, 5 do
    if natural(args[at]) >= next_item then return false end
  end
  return true
end

-- Returns how many entries are pending no more.
local function step_acknowledge(keys, args, list)
  local acked = 0
  for first = list.first, list.first + list.size - 1, 1000 do
    local last = math.min(first + 999, list.first + list.size - 1)
    acked = acked + redis.call('XACK', keys[1], args[1], unpack(args, first, last))
    local fields = {}
    for index = first, last do fields[#fields + 1] = 'x:' .. args[index] end
    redis.call('HDEL', keys[3], unpack(fields))
  end
  return acked
end

-- The first entry that the group has not finished, if that is known. `left` counts those that were pending before this
-- step and still are: where there are none, what the step read is all that is pending.
local function step_floor(keys, group, left, entries, last)
  local first = left == 0 and entries[1] and entries[1][1]
  if left > 0 then
    local pending = redis.call('XPENDING', keys[1], group)
    first = pending[1] > 0 and pending[2]
  end
  return first or (last and id_after(last))
end

-- Notes in meta how far this group is, for those who trim, and for the appends of a queue that is full. `floor` is the
-- first entry that it has not finished, if that was looked for.
local function step_tell(keys, group, lease, changes, floor)
  local function field(name) return whole(changes[name] or lease[name]) or 0 end
  local last = changes.last or lease.last
  local flat = {'fin:' .. group,
    decimal(field('base') + field('acked') + field('dead') - field('replayed') - field('foreign'))}
  if last then flat[3], flat[4] = 'last:' .. group, last end
  if floor then flat[#flat + 1], flat[#flat + 2] = 'floor:' .. group, floor end
  redis.call('HSET', keys[2], unpack(flat))
end

-- The group may just have finished a sealed shard: whoever waits at the gates of its children looks at once.
local function step_through(meta, group, children)
  local values = redis.call('HMGET', meta, 'appended', 'fin:' .. group, 'skip:' .. group, 'delayed')
  local function number(index) return whole(values[index]) or 0 end
  if number(1) - number(2) - number(3) + number(4) > 0 then return end
  for channel in string.gmatch(children, '%S+') do redis.call('SPUBLISH', channel, 'lease') end
end

-- Gives back the space of entries that every group has finished; `floor` is where this one stands.
local function step_trim(keys, group, meta, floor)
  if meta.retains then return end -- tidy trims by age or size
  if not floor or meta.groups ~= group then floor = trim_floor(keys[2], meta.groups) end
  if floor and floor ~= '+' then redis.call('XTRIM', keys[1], 'MINID', floor) end
end

local function later_member(id, due, gets, tag)
  return id .. ':' .. due .. ':' .. gets .. ':' .. tag
end

-- Puts one item into `later`; one of the same id has to be taken out before.
local function later_put(later, kept, id, due, gets, tag, record)
  redis.call('ZADD', later, id, later_member(id, due, gets, tag))
  redis.call('HSET', kept, id, record)
end

-- Fetches one record and counts that it was.
local function later_get(later, kept, id)
  local member = redis.call('ZRANGEBYSCORE', later, id, id)[1]
  local due, gets, tag = string.match(member or '', '^%d+:(%d+):(%d+):(.*)$')
  if not due then return '' end
  redis.call('ZREM', later, member)
  redis.call('ZADD', later, id, later_member(id, due, decimal((natural(gets) or 0) + 1), tag))
  return redis.call('HGET', kept, id) or ''
end

local function later_unget(later, id)
  local member = redis.call('ZRANGEBYSCORE', later, id, id)[1]
  local due, gets, tag = string.match(member or '', '^%d+:(%d+):(%d+):(.*)$')
  if not due then return end
  redis.call('ZREM', later, member)
  redis.call('ZADD', later, id, later_member(id, due, decimal(math.max((natural(gets) or 0) - 1, 0)), tag))
end

-- What an owner that goes in good order fetched in vain: nobody shall take it for what its worker died of.
local function step_uncount(keys, args, untouched, unget)
  for index = untouched.first, untouched.first + untouched.size - 1 do
    redis.call('XCLAIM', keys[1], args[1], 'owner', 0, args[index], 'RETRYCOUNT', 0, 'JUSTID')
  end
  for index = unget.first, unget.first + unget.size - 1 do later_unget(keys[5], args[index]) end
end

local function step_later(keys, args, sections, next_item, now, changes)
  local put, drop = sections.put, sections.drop
  for at = put.first, put.first + put.size * 5 - 1, 5 do
    local id = args[at]
    if id == '0' then
      id, next_item = decimal(next_item), next_item + 1
      changes.later_next = decimal(next_item)
    else
      redis.call('ZREMRANGEBYSCORE', keys[5], id, id)
    end
    local due, gets = decimal(now + natural(args[at + 1])), decimal(natural(args[at + 2]))
    later_put(keys[5], keys[6], id, due, gets, args[at + 3], args[at + 4])
  end
  for at = drop.first, drop.first + drop.size - 1 do
    redis.call('ZREMRANGEBYSCORE', keys[5], args[at], args[at])
    redis.call('HDEL', keys[6], args[at])
  end
  return next_item
end

local function step_dead(keys, args, list)
  local messages = 0
  for index = list.first, list.first + list.size * 2 - 1, 2 do
    redis.call('XADD', keys[4], '*', 'count', args[index], 'record', args[index + 1])
    messages = messages + natural(args[index])
  end
  return messages
end

local function step_jobs(keys, args, list, now)
  for at = list.first, list.first + list.size * 3 - 1, 3 do
    redis.call('HSET', keys[8], 'j:' .. args[at], args[at + 2])
    redis.call('ZADD', keys[7], decimal(now + natural(args[at + 1])), 'j:' .. args[at])
  end
end

local STEP_FIELDS = {'token', 'step', 'epoch', 'renewals', 'heir_nonce', 'heir_ready', 'acked', 'retried', 'dead',
  'delivered', 'foreign', 'base', 'last', 'lost', 'later_next', 'replayed', 'refused'}

local function step_lease(values)
  return {token = values[1], step = values[2], epoch = values[3], renewals = values[4], heir_nonce = values[5],
    heir_ready = values[6], acked = values[7], retried = values[8], dead = values[9], delivered = values[10],
    foreign = values[11], base = values[12], last = values[13], lost = values[14], later_next = values[15],
    replayed = values[16], refused = values[17]}
end

local function step_meta_fields(group)
  return {'appended', 'waiting', 'due', 'marks', 'groups', 'skip:' .. group, 'retention_ms', 'retention_bytes',
    'children'}
end

local function step_meta(values)
  return {appended = natural(values[1]), waiting = values[2], due = natural(values[3]), marks = values[4] or '',
    groups = values[5], skip = natural(values[6]) or 0, retains = values[7] or values[8],
    children = values[9]}
end

-- What would refuse a part of the step when another part is done; else nil, and how many entries are pending where that
-- was asked.
local function step_refused(keys, args, sections)
  if #args == 10 or (#args == 15 and sections.room.size == 1) then return wrong_type('s', keys) end
  local pending = redis.pcall('XPENDING', keys[1], args[1])
  local refused = pending.err
  if not refused then return nil, pending[1] end
  if string.find(refused, 'NOGROUP', 1, true) then return corrupt(keys[1] .. ' is gone, or has no group ' .. args[1]) end
  return wrong_type('s', keys) or redis.error_reply(refused)
end

-- The answer to a step whose number was used before.
local function step_repeated(args, number, lease, heir)
  local token, refused, effect, why = string.match(lease.refused or '', '^(%S*) (%d+) (%d+) (.*)$')
  if token == args[2] and natural(refused) == number then return {'EFFECT', effect, why} end
  return {'REPEAT', heir}
end

local function step(keys, args)
  if #keys < 3 or #args < 10 then return misuse('step takes 3 or more keys and at least 10 arguments') end
  local number, limit, known = natural(args[3]), natural(args[6]), natural(args[10])
  local acked, retried, sections = natural(args[8]), natural(args[9]), step_sections(keys, args)
  local cursor = args[5] == '>' or entry_id((string.gsub(args[5], '>$', '')))
  if not (number and limit and known and acked and retried and sections and cursor) then
    return misuse('step was given malformed arguments')
  end

  local wrong = #keys > 3 and wrong_type(STEP_KEYS, keys)
  if wrong then return wrong end
  -- Where there are but three keys, reading two tells their types, before anything is written.
  local values = redis.pcall('HMGET', keys[3], unpack(STEP_FIELDS))
  local meta = #keys == 3 and redis.pcall('HMGET', keys[2], unpack(step_meta_fields(args[1])))
  local unread = values.err or (meta and meta.err)
  if unread then return wrong_type(STEP_KEYS, keys) or redis.error_reply(unread) end
  local lease = step_lease(values)
  if not lease.token or lease.token == '' or lease.token ~= args[2] then return {'FENCED', lease.epoch or '0'} end
  local heir = lease.heir_ready == '1' and lease.heir_nonce or ''
  local renewals = args[4] == '1' and decimal((natural(lease.renewals) or 0) + 1) or nil
  if number <= (natural(lease.step) or 0) then
    if renewals then redis.call('HSET', keys[3], 'renewals', renewals) end
    return step_repeated(args, number, lease, heir)
  end
  -- A gap: a failover took back steps that were answered, deliveries and acknowledgements included. What the caller holds
  -- is void: it takes its lease anew and starts from the pending entries, as any next owner does.
  if number > (natural(lease.step) or 0) + 1 then return {'FENCED', lease.epoch} end
  if not step_known(args, sections.put, natural(lease.later_next) or 1) then
    return misuse('step was given an item that never was')
  end
  local refused, pending = step_refused(keys, args, sections)
  if refused then return refused end
  if sections.dead.size > 0 and exhausted(keys[4]) then return corrupt(keys[4] .. ' has no ids left') end

  if sections.effect.size > 0 then
    local refused, why = effect_all(keys, args, sections.effect.first, sections.effect.size)
    if refused then
      if renewals then redis.call('HSET', keys[3], 'renewals', renewals) end
      if why == 'FULL' then return {'FULL', decimal(refused)} end
      redis.call('HSET', keys[3], 'step', args[3],
        'refused', args[2] .. ' ' .. decimal(number) .. ' ' .. decimal(refused) .. ' ' .. why)
      return {'EFFECT', decimal(refused), why}
    end
  end

  local changes, now = {step = args[3], renewals = renewals}, #keys > 3 and now_ms() or 0
  if acked > 0 then changes.acked = decimal((natural(lease.acked) or 0) + acked) end
  if retried > 0 then changes.retried = decimal((natural(lease.retried) or 0) + retried) end
  if sections.done.size > 0 then pending = pending - step_acknowledge(keys, args, sections.done) end
  step_uncount(keys, args, sections.untouched, sections.unget)
  if sections.seen.size > 0 then changes.marks = args[sections.seen.first] end
  local part, get = sections.part, sections.get
  for index = part.first, part.first + part.size * 2 - 1, 2 do
    redis.call('HSET', keys[3], 'x:' .. args[index], args[index + 1])
  end
  local dead = step_dead(keys, args, sections.dead)
  if dead > 0 then changes.dead = decimal((natural(lease.dead) or 0) + dead) end
  local next_item = step_later(keys, args, sections, natural(lease.later_next) or 1, now, changes)
  step_jobs(keys, args, sections.job, now)

  -- An effect may have sent to this very shard: what was read before is old then.
  meta = step_meta(meta or redis.call('HMGET', keys[2], unpack(step_meta_fields(args[1]))))
  lease.skip = meta.skip
  if now == 0 and meta.due then now = now_ms() end
  local entries, progress, left, items, records = {}, {}, 'pending', {}, {}
  for index = get.first, get.first + get.size - 1 do
    records[#records + 1] = later_get(keys[5], keys[6], args[index])
  end
  if #keys >= 5 and next_item - 1 > known then
    items = redis.call('ZRANGEBYSCORE', keys[5], '(' .. decimal(known), '+inf', 'LIMIT', 0, STEP_PAGE)
  end
  local room = step_room(args, sections.room)
  if limit > 0 and (#items == 0 or not (room and string.find(args[5], '.>$'))) then
    entries, progress, left = step_fetch(keys, args, limit, room, changes, lease, meta)
  end
  local flat = {}
  for name, value in pairs(changes) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call('HSET', keys[3], unpack(flat))
  local done = sections.done.size > 0
  local floor = nil
  if done or changes.acked or changes.dead or changes.last or changes.base or changes.foreign then
    floor = done and step_floor(keys, args[1], pending, entries, changes.last or lease.last)
    step_tell(keys, args[1], lease, changes, floor)
    if meta.children then step_through(keys[2], args[1], meta.children) end
  end
  if done then step_trim(keys, args[1], meta, floor) end
  return {'OK', heir, entries, progress, decimal(next_item),
    meta.due and decimal(math.max(meta.due - now, 0)) or '', meta.marks, decimal(now), items, records, room and left}
end

redis.register_function{function_name='shardq_1_step', callback=step, flags={'allow-oom'}}
