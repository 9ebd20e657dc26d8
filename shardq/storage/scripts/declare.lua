-- declare: bring queues and shards into being and change their settings. declare, settings, open_shard, tune.
-- Invariants: each is safe to repeat and, settings apart, never overwrites what is there. All keys of a shard exist from
-- here on, so that no call meets a missing key while its slot moves. Settings have a version that rises with every
-- change; a shard never goes back to older ones than it has.

-- declare: publish a queue's routing table and settings unless it has them.
-- KEYS   1 routing hash      ARGV   1 version   2 routing table   3 settings
-- reply  {'CREATED' | 'EXISTS', version, routing table, settings, version of the settings}
--        settings '', version '0': the queue is from before there were any
local function declare(keys, args)
  if #keys ~= 1 or #args ~= 3 or not natural(args[1]) then return misuse('declare takes 1 key and 3 arguments') end
  local stored = redis.call('HMGET', keys[1], 'version', 'table', 'settings', 'settings_version')
  if stored[1] then return {'EXISTS', stored[1], stored[2], stored[3] or '', stored[4] or '0'} end
  local settings_version = next_term(nil)
  redis.call('HSET', keys[1], 'version', args[1], 'table', args[2], 'settings', args[3],
    'settings_version', settings_version)
  return {'CREATED', args[1], args[2], args[3], settings_version}
end

-- settings: put new settings in place of those the caller read. The shards are told with tune, with this version.
-- KEYS   1 routing hash      ARGV   1 version of the settings that were read   2 new settings
-- reply  {'OK', version of the settings}   |   {'CHANGED'} others were faster: read again   |   {'MISSING'} no such queue
local function settings(keys, args)
  if #keys ~= 1 or #args ~= 2 or not natural(args[1]) then return misuse('settings takes 1 key and 2 arguments') end
  local stored = redis.call('HMGET', keys[1], 'version', 'settings', 'settings_version')
  if not stored[1] then return {'MISSING'} end
  if stored[2] == args[2] and stored[3] then return {'OK', stored[3]} end -- also the answer to a repeated call
  if (stored[3] or '0') ~= args[1] then return {'CHANGED'} end
  local version = next_term(stored[3])
  redis.call('HSET', keys[1], 'settings', args[2], 'settings_version', version)
  return {'OK', version}
end

-- What a shard has to know of its queue's settings, by the names of its meta hash, and what each may be.
local LIMITS = {max_backlog = natural, retention_ms = natural, retention_bytes = natural, overflow = function(value)
  return value == 'block' or value == 'reject' or value == 'drop-oldest'
end}

local function limits_sound(args)
  if not natural(args[1]) or #args % 2 ~= 1 then return false end
  for index = 2, #args, 2 do
    local sound = LIMITS[args[index]]
    if not sound or not sound(args[index + 1]) then return false end
  end
  return true
end

-- Gives a shard the settings of args, a version and pairs, unless it has newer ones; returns whether it did.
local function limits_put(meta, args)
  local stored = natural(redis.call('HGET', meta, 'settings_version') or '0') or 0
  if natural(args[1]) < stored then return false end
  for name in pairs(LIMITS) do redis.call('HDEL', meta, name) end
  redis.call('HSET', meta, 'settings_version', unpack(args))
  return true
end

-- open_shard: an empty stream, its meta hash, and the keys of what waits for its time.
-- KEYS   1 stream   2 meta   3 delayed   4 expiring   5 timed
-- ARGV   as tune; a shard that exists takes them too where they are newer: a change that was cut short is completed
-- reply  {'CREATED' | 'EXISTS'}
-- Sets and hashes get a sentinel, '', so that they exist while they are empty.
local function open_shard(keys, args)
  if #keys ~= 5 or not limits_sound(args) then return misuse('open_shard takes 5 keys, a version and settings') end
  redis.call('ZADD', keys[3], '+inf', '')
  redis.call('ZADD', keys[4], '+inf', '')
  redis.call('HSET', keys[5], '', '')
  local created = redis.call('HSETNX', keys[2], 'state', 'open') == 1
  limits_put(keys[2], args)
  if not created then return {'EXISTS'} end
  -- A group made and destroyed is the one way to an empty stream.
  redis.call('XGROUP', 'CREATE', keys[1], 'shardq', '0', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', keys[1], 'shardq')
  redis.call('HSET', keys[2], 'appended', '0', 'bytes', '0', 'groups', '')
  return {'CREATED'}
end

-- tune: give a shard its share of the queue's settings.
-- KEYS   1 meta
-- ARGV   1 version of the settings   then pairs: max_backlog, overflow, retention_ms, retention_bytes and their values;
--        a name that is left out is not set any more
-- reply  {'OK'}   |   {'NEWER'} the shard has newer ones: nothing was done   |   {'MISSING'} there is no such shard
local function tune(keys, args)
  if #keys ~= 1 or not limits_sound(args) then return misuse('tune takes 1 key, a version and settings') end
  if redis.call('HEXISTS', keys[1], 'state') == 0 then return {'MISSING'} end
  return limits_put(keys[1], args) and {'OK'} or {'NEWER'}
end

redis.register_function('shardq_1_declare', declare)
redis.register_function('shardq_1_open_shard', guarded('shzzh', open_shard))
redis.register_function{function_name='shardq_1_settings', callback=settings, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_tune', callback=tune, flags={'allow-oom'}}
