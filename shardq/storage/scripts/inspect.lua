-- inspect: the counters of one shard and its groups, for the exporter and the status table. Writes nothing.
-- KEYS   1 stream   2 meta   then one group hash for each group named in ARGV
-- ARGV   group names
-- reply  {'OK', server time in ms, entries stored, first entry id or '', meta values, then for each group
--         {values, pending entries, oldest pending id or '', oldest undelivered id or ''}}   |   {'MISSING'}
-- Invariant: values come in the order of the two lists below, '' where a field is absent.

local META_FIELDS = {'state', 'appended', 'bytes', 'groups'}
local GROUP_FIELDS = {'owner', 'epoch', 'token', 'renewals', 'heir', 'plan',
  'base', 'acked', 'retried', 'dead', 'delivered', 'foreign', 'last'}

local function inspect_values(key, names)
  local values = redis.call('HMGET', key, unpack(names))
  for index = 1, #names do values[index] = values[index] or '' end
  return values
end

local function inspect(keys, args)
  if #keys ~= #args + 2 then return misuse('inspect takes a key for each group and 2 more') end
  local meta = inspect_values(keys[2], META_FIELDS)
  if meta[1] == '' then return {'MISSING'} end
  local first = redis.call('XRANGE', keys[1], '-', '+', 'COUNT', 1)[1]
  local reply = {'OK', decimal(now_us() / 1000), redis.call('XLEN', keys[1]), first and first[1] or '', meta}
  for index, group in ipairs(args) do
    local values = inspect_values(keys[index + 2], GROUP_FIELDS)
    local pending, unread = {0, ''}, ''
    if values[2] ~= '' then
      pending = redis.call('XPENDING', keys[1], group)
      local after = values[13] ~= '' and id_after(values[13]) or '-'
      local next_entry = redis.call('XRANGE', keys[1], after, '+', 'COUNT', 1)[1]
      unread = next_entry and next_entry[1] or ''
    end
    reply[#reply + 1] = {values, pending[1], pending[2] or '', unread}
  end
  return reply
end

-- build: which build of this library a node runs.      KEYS none   ARGV none   reply  the build number
local function build(_, _)
  return LIBRARY_BUILD
end

redis.register_function{function_name='shardq_1_inspect', callback=inspect, flags={'no-writes'}}
redis.register_function{function_name='shardq_1_build', callback=build, flags={'no-writes'}}
