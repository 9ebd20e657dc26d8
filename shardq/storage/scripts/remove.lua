-- remove: takes a whole shard out of Redis, messages and groups. remove_shard.
-- Invariant: a shard goes in one step, with every group that is registered on it. allow-oom: it only frees.

-- remove_shard: deletes the shard's keys and those of its groups. What handlers keep there (message.local_key) stays:
-- it is the user's.
-- KEYS   1 stream   2 meta   3 delayed   4 expiring   5 timed   then for each group: group hash, dead letters, later,
--        kept
-- ARGV   1 '1' also when leases are held   2 bell channel   then the groups' names
-- reply  {'OK'} | {'HELD', owner, group}: nothing was done | {'CHANGED'} other groups are registered: nothing was done
--        {'ABSENT'} there was nothing
local function remove_shard(keys, args)
  if #keys < 5 or #args < 2 or #keys ~= 5 + 4 * (#args - 2) then
    return misuse('remove_shard takes 5 keys and 4 for each group')
  end
  local named = {}
  for index = 3, #args do
    local lease = reset_lease(keys[6 + 4 * (index - 3)])
    if lease.held and args[1] ~= '1' then return {'HELD', lease.owner, args[index]} end
    named[args[index]] = true
  end
  for name in string.gmatch(redis.call('HGET', keys[2], 'groups') or '', '%S+') do
    if not named[name] then return {'CHANGED'} end
  end
  local gone = 0
  for _, key in ipairs(keys) do gone = gone + redis.call('UNLINK', key) end
  if gone == 0 then return {'ABSENT'} end
  redis.call('SPUBLISH', args[2], 'lease')
  return {'OK'}
end

redis.register_function{function_name='shardq_1_remove_shard', callback=remove_shard, flags={'allow-oom'}}
