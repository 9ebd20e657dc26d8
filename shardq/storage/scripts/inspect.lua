-- inspect: the counters of one shard and its groups, for the exporter and the status table. Writes nothing.
-- KEYS   1 stream   2 meta   then for each group named in ARGV: group hash, dead letters, later, kept (clients of builds
--        below 5 don't name kept)
-- ARGV   group names
-- reply  {'OK', server time in ms, entries stored, first entry id or '', meta values, then for each group
--         {values, pending entries, oldest pending id or '', oldest undelivered id or '', messages in `later`,
--          dead letters kept, messages dropped that the group has not passed yet, entry of the message that was put
--          off first and still waits, or ''}}   |   {'MISSING'}
-- Invariant: values come in the order of the two lists below, '' where a field is absent.

local META_FIELDS = {'state', 'appended', 'bytes', 'groups', 'delayed', 'dropped'}
local GROUP_FIELDS = {'owner', 'epoch', 'token', 'renewals', 'heir', 'plan',
  'base', 'acked', 'retried', 'dead', 'delivered', 'foreign', 'last', 'replayed', 'lost', 'given_up'}

local function inspect_values(key, names)
  local values = redis.call('HMGET', key, unpack(names))
  for index = 1, #names do values[index] = values[index] or '' end
  return values
end

-- The entry of the message that was put off first: a kept record is a msgpack array that begins with it.
local function inspect_waiting(later, kept)
  -- A user whose rights are those of an older build may not look: what waits has no age then.
  local member = redis.pcall('ZRANGE', later, 1, 1)[1]
  local id = member and string.match(member, '^(%d+):')
  local record = id and redis.call('HGET', kept, id) or ''
  local kind, size = string.byte(record, 1, 2)
  if not size or kind < 0x90 or kind > 0x9f or size < 0xa0 or size > 0xbf then return '' end
  local last = 2 + size - 0xa0
  return #record > last and entry_id(string.sub(record, 3, last)) or ''
end

local function inspect(keys, args)
  local width = #keys == #args * 3 + 2 and 3 or 4
  if #keys ~= #args * width + 2 then return misuse('inspect takes four keys for each group and 2 more') end
  local meta = inspect_values(keys[2], META_FIELDS)
  if meta[1] == '' then return {'MISSING'} end
  local first = redis.call('XRANGE', keys[1], '-', '+', 'COUNT', 1)[1]
  local reply = {'OK', decimal(now_ms()), redis.call('XLEN', keys[1]), first and first[1] or '', meta}
  for index, group in ipairs(args) do
    local place = (index - 1) * width + 3
    local values = inspect_values(keys[place], GROUP_FIELDS)
    local part = {values, 0, '', '', 0, 0, 0, ''}
    if values[2] ~= '' then
      local pending = redis.call('XPENDING', keys[1], group)
      local after = values[13] ~= '' and id_after(values[13]) or '-'
      local next_entry = redis.call('XRANGE', keys[1], after, '+', 'COUNT', 1)[1]
      part[2], part[3], part[4] = pending[1], pending[2] or '', next_entry and next_entry[1] or ''
      part[5] = math.max(redis.call('ZCARD', keys[place + 2]) - 1, 0)
      part[6] = redis.call('XLEN', keys[place + 1])
      part[7] = natural(redis.call('HGET', keys[2], 'skip:' .. group) or '') or 0
      if width == 4 and part[5] > 0 then part[8] = inspect_waiting(keys[place + 2], keys[place + 3]) end
    end
    reply[#reply + 1] = part
  end
  return reply
end

-- build: which build of this library a node runs.      KEYS none   ARGV none   reply  the build number
local function build(_, _)
  return LIBRARY_BUILD
end

redis.register_function{function_name='shardq_1_inspect', callback=inspect, flags={'no-writes'}}
redis.register_function{function_name='shardq_1_build', callback=build, flags={'no-writes'}}
