-- fetch: what a step brings of the stream: pending entries, new ones, and how they are counted. Registers nothing; step.lua
-- says what it is given and what it answers. Writes nothing but what the counting needs, and the bell's flag in meta.

local function step_room(args, section)
  if section.size == 0 then return nil end
  local entries, messages, bytes = unpack(args, section.first, section.first + 2)
  return {entries = natural(entries), messages = natural(messages), bytes = natural(bytes)}
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

local function step_read(keys, args, cursor, limit)
  local reply = redis.call('XREADGROUP', 'GROUP', args[1], 'owner', 'COUNT', limit, 'STREAMS', keys[1], cursor)
  return reply and reply[1][2] or {}
end

-- Entries that were delivered before and not finished, and of each 'times delivered:progress'.
local function step_pending(keys, args, after, limit)
  local entries, progress = step_read(keys, args, after, limit), {}
  for index = 1, #entries do
    local id = entries[index][1]
    local pending = redis.call('XPENDING', keys[1], args[1], id, id, 1)[1]
    progress[index] = decimal(pending and pending[4] or 0) .. ':' .. (redis.call('HGET', keys[3], 'x:' .. id) or '')
    -- An entry that someone deleted while it was pending has no fields; an array can't end in nil.
    if not entries[index][2] then entries[index][2] = {} end
  end
  return entries, progress
end

-- New entries, until the room is full or there are no more; true then.
local function step_new(keys, args, limit, room)
  local entries, messages, bytes = step_read(keys, args, '>', limit), 0, 0
  if not room then return entries, #entries < limit end
  local taken, asked, from = #entries, limit, 1
  while taken == asked do
    for index = from, #entries do
      local fields = entries[index][2]
      messages = messages + entry_count(fields)
      for place = 1, #fields do bytes = bytes + #fields[place] end
    end
    local had = #entries
    local share = math.min(room.entries / had, room.messages / messages, room.bytes / math.max(bytes, 1)) - 1
    asked = math.min(math.ceil(share * had), room.entries - had)
    if share <= 0 or asked < 1 then return entries, false end
    local more = step_read(keys, args, '>', asked)
    taken, from = #more, had + 1
    for index = 1, taken do entries[had + index] = more[index] end
  end
  return entries, true
end

-- What was read, the progress of those that were pending, and what may be left.
local function step_fetch(keys, args, limit, room, changes, lease, meta)
  local entries, progress, through, after = {}, {}, false, string.match(args[5], '^([^>]+)')
  if after then
    entries, progress = step_pending(keys, args, after, limit)
    if #entries == limit or after == args[5] then
      if #entries == 0 and args[7] == '1' and meta.waiting ~= '1' then redis.call('HSET', keys[2], 'waiting', '1') end
      return entries, progress, 'pending'
    end
  end
  local new
  new, through = step_new(keys, args, limit, room)
  step_count(keys, args[1], new, through and meta.appended or nil, changes, lease)
  if (through and room or #new == 0) and args[7] == '1' and meta.waiting ~= '1' then
    redis.call('HSET', keys[2], 'waiting', '1')
  end
  if #entries == 0 then return new, progress, through and '' or 'new' end
  for index = 1, #new do entries[#entries + 1] = new[index] end
  return entries, progress, through and '' or 'new'
end
