-- control: the members, the leader and the plan of one group. beat, lead, resign, plan, leave, pause.
-- One hash per group, on the queue's own slot:
--   m:<worker>  'nonce:beats:state'     leader, leader_nonce, term, leader_beats     plan_version, plan     paused
-- Invariants: one leader per term; the term rises at every election; only the current term's leader writes a plan, and
-- the plan's version rises with every one. Death is told by counters that stand still on the observer's own clock,
-- never by a wall clock. A member's first heartbeat makes the hash; of members nothing else does, so it stays away once
-- the group is deleted. allow-oom on all.

-- beat: one heartbeat; the leader's own renews its leadership.
-- KEYS   1 control hash
-- ARGV   1 worker   2 nonce   3 beats so far (1 at the start of an incarnation)   4 state: active | leaving
--        5 term it leads, or '0'   6 plan version it knows   then '*' or names of the members it wants to see
-- reply  {'OK', term, leader's nonce, leader's beats, plan version, plan or '' when known, members as name, value, ...,
--         '1' while the group is paused, else ''}
--        {'REPLACED'}   another incarnation goes under this worker's name
--        {'GONE'}   the hash it joined is there no more, deleted or lost, and nothing was written: it may join again
local function beat(keys, args)
  if #keys ~= 1 or #args < 6 then return misuse('beat takes 1 key and at least 6 arguments') end
  local key, field = keys[1], 'm:' .. args[1]
  local stored = redis.call('HGET', key, field)
  if stored and args[3] ~= '1' and string.sub(stored, 1, #args[2] + 1) ~= args[2] .. ':' then return {'REPLACED'} end
  local state = redis.call('HMGET', key, 'term', 'leader_nonce', 'leader_beats', 'plan_version', 'paused')
  -- Whom a leader took for dead is not there either: but then there was a term.
  if not stored and args[3] ~= '1' and not state[1] then return {'GONE'} end
  redis.call('HSET', key, field, args[2] .. ':' .. args[3] .. ':' .. args[4])
  if args[5] ~= '0' and state[1] == args[5] and state[2] == args[2] then
    state[3] = decimal((natural(state[3]) or 0) + 1)
    redis.call('HSET', key, 'leader_beats', state[3])
  end
  local plan = ''
  if state[4] and state[4] ~= args[6] then plan = redis.call('HGET', key, 'plan') or '' end
  local members = {}
  if args[7] == '*' then
    local flat = redis.call('HGETALL', key)
    for index = 1, #flat, 2 do
      if string.sub(flat[index], 1, 2) == 'm:' then
        members[#members + 1] = string.sub(flat[index], 3)
        members[#members + 1] = flat[index + 1]
      end
    end
  else
    for index = 7, #args do
      members[#members + 1] = args[index]
      members[#members + 1] = redis.call('HGET', key, 'm:' .. args[index]) or ''
    end
  end
  return {'OK', state[1] or '0', state[2] or '', state[3] or '0', state[4] or '0', plan, members, state[5] or ''}
end

-- lead: a member becomes the leader when there is none, or when the one there stood still for a whole leader lease.
-- KEYS   1 control hash      ARGV   1 worker   2 nonce   3 term seen   4 leader's beats seen
-- reply  {'OK', term} | {'HELD', term, beats} | {'ABSENT'} it is no member (any more)
local function lead(keys, args)
  if #keys ~= 1 or #args ~= 4 then return misuse('lead takes 1 key and 4 arguments') end
  local state = redis.call('HMGET', keys[1], 'term', 'leader_nonce', 'leader_beats')
  local held = state[2] and state[2] ~= ''
  if held and state[2] == args[2] then return {'OK', state[1]} end
  if held and not (state[1] == args[3] and state[3] == args[4]) then return {'HELD', state[1], state[3]} end
  if not redis.call('HGET', keys[1], 'm:' .. args[1]) then return {'ABSENT'} end
  local term = next_term(state[1])
  redis.call('HSET', keys[1], 'term', term, 'leader', args[1], 'leader_nonce', args[2], 'leader_beats', '0')
  return {'OK', term}
end

-- resign: leave the leadership at once, so that nobody has to wait it out.
-- KEYS   1 control hash      ARGV   1 nonce   2 term   3 control channel      reply  {'OK'} | {'DEPOSED'}
local function resign(keys, args)
  if #keys ~= 1 or #args ~= 3 then return misuse('resign takes 1 key and 3 arguments') end
  local state = redis.call('HMGET', keys[1], 'term', 'leader_nonce')
  if state[1] ~= args[2] or state[2] ~= args[1] then return {'DEPOSED'} end
  redis.call('HSET', keys[1], 'leader', '', 'leader_nonce', '')
  redis.call('SPUBLISH', args[3], 'leader')
  return {'OK'}
end

-- plan: the leader's new plan; removes members it saw dead, unless they moved since.
-- KEYS   1 control hash
-- ARGV   1 nonce   2 term   3 the plan   4 control channel   then pairs (worker, value it was seen with) to remove
-- reply  {'OK', version} | {'DEPOSED'}
local function plan(keys, args)
  if #keys ~= 1 or #args < 4 or #args % 2 ~= 0 then return misuse('plan takes 1 key and 4 or more arguments') end
  local state = redis.call('HMGET', keys[1], 'term', 'leader_nonce', 'plan_version', 'plan')
  if state[1] ~= args[2] or state[2] ~= args[1] then return {'DEPOSED'} end
  for index = 5, #args, 2 do
    if redis.call('HGET', keys[1], 'm:' .. args[index]) == args[index + 1] then
      redis.call('HDEL', keys[1], 'm:' .. args[index])
    end
  end
  local version = state[3]
  if state[4] ~= args[3] then
    version = next_term(state[3])
    redis.call('HSET', keys[1], 'plan_version', version, 'plan', args[3])
    add(keys[1], 'rebalances', 1)
    redis.call('SPUBLISH', args[4], 'plan')
  end
  return {'OK', version}
end

-- leave: a worker goes for good.
-- KEYS   1 control hash
-- ARGV   1 worker   2 nonce   3 control channel   then maybe   4 '1': the group is not there (any more), so the hash goes
--        with the last member, unless it says that a group is paused: then somebody opened that anew
-- reply  {'OK', members that are left}
local function leave(keys, args)
  if #keys ~= 1 or #args < 3 or #args > 4 then return misuse('leave takes 1 key and 3 or 4 arguments') end
  local stored = redis.call('HGET', keys[1], 'm:' .. args[1])
  if stored and string.sub(stored, 1, #args[2] + 1) == args[2] .. ':' then
    redis.call('HDEL', keys[1], 'm:' .. args[1])
    redis.call('SPUBLISH', args[3], 'member')
  end
  local flat, fields, members, paused = redis.call('HGETALL', keys[1]), {}, 0, false
  for index = 1, #flat, 2 do
    fields[#fields + 1] = flat[index]
    if string.sub(flat[index], 1, 2) == 'm:' then members = members + 1 end
    paused = paused or flat[index] == 'paused'
  end
  if args[4] == '1' and members == 0 and not paused and #fields > 0 then redis.call('HDEL', keys[1], unpack(fields)) end
  return {'OK', decimal(members)}
end

-- pause: workers give their leases back once what they are at is done, and take none until the group is resumed. The
-- flag lives and dies with the group's control hash.
-- KEYS   1 control hash      ARGV   1 '1' to pause, '' to resume   2 control channel      reply  {'OK'}
local function pause(keys, args)
  if #keys ~= 1 or #args ~= 2 then return misuse('pause takes 1 key and 2 arguments') end
  if args[1] == '1' then
    redis.call('HSET', keys[1], 'paused', '1')
  else
    redis.call('HDEL', keys[1], 'paused')
  end
  redis.call('SPUBLISH', args[2], 'pause')
  return {'OK'}
end

redis.register_function{function_name='shardq_1_beat', callback=beat, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_lead', callback=lead, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_resign', callback=resign, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_plan', callback=plan, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_leave', callback=leave, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_pause', callback=pause, flags={'allow-oom'}}
