-- step: commit what was finished since the last step and fetch what comes next, for the lease's owner only.
-- KEYS   1 stream   2 meta   3 group hash; when there is more to do than finish and fetch entries: 4 dead letters
--        5 later   6 kept   7 expiring   8 timed, then the keys of effects
-- ARGV   1 group   2 token   3 step number   4 '1' to renew the lease   5 cursor: '>' for new entries, or an entry id
--        to read the pending ones after it   6 entries to fetch at most (0: none)   7 '1' to be rung when nothing came
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
--          job      job id, ms to keep its record, the record
--          effect   see effect.lua
-- reply  {'OK', heir nonce once it is ready else '', entries as XREADGROUP gives them,
--         for each pending entry 'times delivered:progress', next item id of `later`, ms until a delayed message is due
--         or '', version of the marks of deleted messages or '', server time in ms, items of `later` above the known ones
--         (at most 1000), for each item of get its record or ''}
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
  job = 3}
local STEP_SMALL = {done = true, part = true, untouched = true, seen = true} -- for which three keys are enough
local STEP_PAGE = 1000

local function step_item(text) return string.find(text, '^[1-9]%d*$') and natural(text) end
local function step_put(text) return text == '0' or step_item(text) end

-- What the parts of an item must be, by their place; others may be anything.
local STEP_FORM = {done = {entry_id}, part = {entry_id}, dead = {natural}, put = {step_put, natural, natural},
  drop = {step_item}, get = {step_item}, untouched = {entry_id}, unget = {step_item}, seen = {}, job = {[2] = natural}}

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
  local sections, at = {effect = {first = 0, size = 0}}, 11
  for name in pairs(STEP_WIDTH) do sections[name] = {first = 0, size = 0} end
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

local function step_acknowledge(keys, args, list)
  for first = list.first, list.first + list.size - 1, 1000 do
    local last = math.min(first + 999, list.first + list.size - 1)
    redis.call('XACK', keys[1], args[1], unpack(args, first, last))
    local fields = {}
    for index = first, last do fields[#fields + 1] = 'x:' .. args[index] end
    redis.call('HDEL', keys[3], unpack(fields))
  end
end

-- Notes in meta how far this group is, for those who trim, and for the appends of a queue that is full.
local function step_tell(keys, group, lease, changes, done)
  local function field(name) return whole(changes[name] or lease[name]) or 0 end
  local last = changes.last or lease.last
  local flat = {'fin:' .. group,
    decimal(field('base') + field('acked') + field('dead') - field('replayed') - field('foreign'))}
  if last then flat[3], flat[4] = 'last:' .. group, last end
  if done then
    local pending = redis.call('XPENDING', keys[1], group)
    local floor = pending[1] > 0 and pending[2] or (last and id_after(last))
    if floor then flat[#flat + 1], flat[#flat + 2] = 'floor:' .. group, floor end
  end
  redis.call('HSET', keys[2], unpack(flat))
end

-- Gives back the space of entries that every group has finished.
local function step_trim(keys, meta)
  if meta.retains then return end -- tidy trims by age or size
  local floor = trim_floor(keys[2], meta.groups)
  if floor and floor ~= '+' then redis.call('XTRIM', keys[1], 'MINID', floor) end
end

-- Counts what was just delivered. `foreign` are messages that did not come through append: another client's entries, and
-- forged or broken ones. Ours follow one another without a gap, unless a full queue dropped its oldest: what is missing is
-- `lost`, and counts as gone before the group began. Once everything there is was delivered, whatever was delivered
-- beyond what was appended is foreign, which puts right what a forged number may have upset.
local function step_count(keys, group, entries, appended, changes, lease)
  local base, delivered = whole(lease.base) or 0, natural(lease.delivered) or 0
  local foreign, lost = natural(lease.foreign) or 0, 0
  for index = 1, #entries do
    local count, at = entry_count(entries[index][2])
    local gap = at and at - (base + delivered - foreign)
    if gap and gap > 0 and lost + gap <= lease.skip then
      base, lost, gap = base + gap, lost + gap, 0
    end
    if gap ~= 0 then foreign = foreign + count end
    delivered = delivered + count
  end
  if appended then
    local rest = appended - (base + delivered - foreign)
    if rest > 0 and lost + rest <= lease.skip then base, lost = base + rest, lost + rest end
    foreign = math.max(base + delivered - appended, 0)
  end
  if #entries > 0 then
    changes.last = entries[#entries][1]
    changes.delivered = decimal(delivered)
  end
  if decimal(foreign) ~= lease.foreign then changes.foreign = decimal(foreign) end
  if lost > 0 then
    changes.base, changes.lost = decimal(base), decimal((natural(lease.lost) or 0) + lost)
    add(keys[2], 'skip:' .. group, decimal(-lost))
  end
end

local function step_fetch(keys, args, limit, changes, lease, meta)
  local reply = redis.call('XREADGROUP', 'GROUP', args[1], 'owner', 'COUNT', limit, 'STREAMS', keys[1], args[5])
  local entries = reply and reply[1][2] or {}
  local progress = {}
  if args[5] == '>' then
    step_count(keys, args[1], entries, #entries < limit and meta.appended or nil, changes, lease)
  else
    for index = 1, #entries do
      local id = entries[index][1]
      local pending = redis.call('XPENDING', keys[1], args[1], id, id, 1)[1]
      progress[index] = decimal(pending and pending[4] or 0) .. ':' .. (redis.call('HGET', keys[3], 'x:' .. id) or '')
      -- An entry that someone deleted while it was pending has no fields; an array can't end in nil.
      if not entries[index][2] then entries[index][2] = {} end
    end
  end
  if #entries == 0 and args[7] == '1' and meta.waiting ~= '1' then
    redis.call('HSET', keys[2], 'waiting', '1')
  end
  return entries, progress
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

local function step_lease(key)
  local lease, values = {}, redis.call('HMGET', key, unpack(STEP_FIELDS))
  for index, name in ipairs(STEP_FIELDS) do lease[name] = values[index] end
  return lease
end

local function step_meta(key, group)
  local values = redis.call('HMGET', key, 'appended', 'waiting', 'due', 'marks', 'groups', 'skip:' .. group,
    'retention_ms', 'retention_bytes')
  return {appended = natural(values[1] or ''), waiting = values[2], due = natural(values[3] or ''), marks = values[4] or '',
    groups = values[5], skip = natural(values[6] or '') or 0, retains = values[7] or values[8]}
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
  local cursor = args[5] == '>' or entry_id(args[5])
  if not (number and limit and known and acked and retried and sections and cursor) then
    return misuse('step was given malformed arguments')
  end

  local lease = step_lease(keys[3])
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
  -- What would refuse a part of the step when another part is done.
  local refused = #args > 10 and redis.pcall('XPENDING', keys[1], args[1]).err
  if refused then
    local absent = string.find(refused, 'NOGROUP', 1, true)
    return absent and corrupt(keys[1] .. ' is gone, or has no group ' .. args[1]) or redis.error_reply(refused)
  end
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

  local changes, now = {step = args[3], renewals = renewals}, now_ms()
  if acked > 0 then changes.acked = decimal((natural(lease.acked) or 0) + acked) end
  if retried > 0 then changes.retried = decimal((natural(lease.retried) or 0) + retried) end
  if sections.done.size > 0 then step_acknowledge(keys, args, sections.done) end
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

  local meta = step_meta(keys[2], args[1])
  lease.skip = meta.skip
  local entries, progress, items, records = {}, {}, {}, {}
  if limit > 0 then entries, progress = step_fetch(keys, args, limit, changes, lease, meta) end
  for index = get.first, get.first + get.size - 1 do
    records[#records + 1] = later_get(keys[5], keys[6], args[index])
  end
  if #keys >= 5 and next_item - 1 > known then
    items = redis.call('ZRANGEBYSCORE', keys[5], '(' .. decimal(known), '+inf', 'LIMIT', 0, STEP_PAGE)
  end
  local flat = {}
  for name, value in pairs(changes) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call('HSET', keys[3], unpack(flat))
  local done = sections.done.size > 0
  if done or changes.acked or changes.dead or changes.last or changes.base or changes.foreign then
    step_tell(keys, args[1], lease, changes, done)
  end
  if done then step_trim(keys, meta) end
  return {'OK', heir, entries, progress, decimal(next_item),
    meta.due and decimal(math.max(meta.due - now, 0)) or '', meta.marks, decimal(now), items, records}
end

redis.register_function{function_name='shardq_1_step', callback=guarded('shhszhzh', step), flags={'allow-oom'}}
