-- declare: bring queues, shards and groups into being. declare, open_shard, open_group, build.
-- Invariants: each is safe to repeat and never overwrites what is there. All keys of a shard exist from here on, so that
-- no call meets a missing key while its slot moves.

-- declare: publish a queue's routing table unless it has one.
-- KEYS   1 routing hash      ARGV   1 version   2 routing table
-- reply  {'CREATED' | 'EXISTS', version, routing table}
local function declare(keys, args)
  if #keys ~= 1 or #args ~= 2 or not natural(args[1]) then return misuse('declare takes 1 key and 2 arguments') end
  local stored = redis.call('HMGET', keys[1], 'version', 'table')
  if stored[1] then return {'EXISTS', stored[1], stored[2]} end
  redis.call('HSET', keys[1], 'version', args[1], 'table', args[2])
  return {'CREATED', args[1], args[2]}
end

-- open_shard: an empty stream and its meta hash.
-- KEYS   1 stream   2 meta      ARGV   none      reply  {'CREATED' | 'EXISTS'}
local function open_shard(keys, args)
  if #keys ~= 2 or #args ~= 0 then return misuse('open_shard takes 2 keys') end
  if redis.call('HSETNX', keys[2], 'state', 'open') == 0 then return {'EXISTS'} end
  -- A group made and destroyed is the one way to an empty stream.
  redis.call('XGROUP', 'CREATE', keys[1], 'shardq', '0', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', keys[1], 'shardq')
  redis.call('HSET', keys[2], 'appended', '0', 'bytes', '0', 'groups', '')
  return {'CREATED'}
end

-- open_group: a group that reads a shard from its first stored message.
-- KEYS   1 stream   2 meta   3 group hash   4 dead letters      ARGV   1 group
-- reply  {'CREATED' | 'EXISTS' | 'MISSING'}
-- 'base' is the number of messages that were gone before the group began: they count as finished.
local function open_group(keys, args)
  if #keys ~= 4 or #args ~= 1 then return misuse('open_group takes 4 keys and 1 argument') end
  local meta = redis.call('HMGET', keys[2], 'state', 'appended', 'groups')
  if not meta[1] then return {'MISSING'} end
  if redis.call('EXISTS', keys[3]) == 1 then return {'EXISTS'} end
  redis.call('XGROUP', 'CREATE', keys[1], args[1], '0', 'MKSTREAM')
  if redis.call('EXISTS', keys[4]) == 0 then
    redis.call('XGROUP', 'CREATE', keys[4], 'shardq', '0', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', keys[4], 'shardq')
  end
  -- The first entry of ours that is left says how many are gone; another client's entries before it say nothing.
  local base, from = nil, '-'
  while not base do
    local entries = redis.call('XRANGE', keys[1], from, '+', 'COUNT', 16)
    for _, entry in ipairs(entries) do
      local _, at = entry_count(entry[2])
      base = base or (at and at <= natural(meta[2]) and decimal(at))
    end
    if #entries == 0 then base = base or meta[2] else from = '(' .. entries[#entries][1] end
  end
  redis.call('HSET', keys[3], 'epoch', '0', 'token', '', 'renewals', '0', 'step', '0', 'plan', '0', 'base', base,
    'acked', '0', 'retried', '0', 'dead', '0', 'delivered', '0', 'foreign', '0')
  redis.call('HSET', keys[2], 'groups', meta[3] == '' and args[1] or (meta[3] .. ' ' .. args[1]))
  return {'CREATED'}
end

redis.register_function('shardq_1_declare', declare)
redis.register_function('shardq_1_open_shard', open_shard)
redis.register_function('shardq_1_open_group', open_group)
