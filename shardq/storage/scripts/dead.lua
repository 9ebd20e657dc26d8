-- dead: dead letters of one group on one shard. replay, purge.
-- Invariants: a dead letter is in the dead letters or among what is handled later, never in both and never in none, however
-- often a call is repeated. Counters: dead - replayed is what the group counts as finished by giving up.

local DEAD_AT_ONCE = 1000

-- Whether the dead letters that args name from 3 on are well formed, with `head` arguments before the items of each.
local function replay_sound(args, head)
  local at = 3
  while at <= #args do
    local items = natural(args[at + 2] or '')
    if not items or not natural(args[at + 1]) or not entry_id(args[at]) then return false end
    if head == 6 and not natural(args[at + 4] or '') then return false end
    at = at + head + items * 2
  end
  return at == #args + 1
end

-- replay: hands dead letters back to their group, which handles them as its own retries. What is counted is what is
-- handed back: of an entry that stands for many messages some may be gone for good.
-- KEYS   1 meta   2 group hash   3 dead letters   4 later   5 kept; where letters are of jobs: 6 expiring   7 timed
-- ARGV   1 group   2 bell channel   then for each: dead letter's entry id, messages it stood for, how many items follow,
--        with 7 keys its job's id or '', ms to keep the job's record, and that, then for each item: tag of its key, record
-- reply  {'OK', dead letters handed back} | {'MISSING'} no such group
local function replay(keys, args)
  local head = #keys == 7 and 6 or 3
  if (#keys ~= 5 and #keys ~= 7) or #args < 2 or not replay_sound(args, head) then
    return misuse('replay takes 5 or 7 keys, a group, a bell and a list of dead letters')
  end
  local state = redis.call('HMGET', keys[2], 'epoch', 'later_next', 'replayed')
  if not state[1] or redis.call('HGET', keys[1], 'state') == 'removing' then return {'MISSING'} end
  local first, letters, now, at = natural(state[2] or '') or 1, 0, decimal(now_ms()), 3
  local next_item = first
  while at <= #args do
    local items = natural(args[at + 2])
    if redis.call('XDEL', keys[3], args[at]) == 1 then
      if head == 6 and args[at + 3] ~= '' then
        redis.call('HSET', keys[7], 'j:' .. args[at + 3], args[at + 5])
        redis.call('ZADD', keys[6], decimal(now_ms() + natural(args[at + 4])), 'j:' .. args[at + 3])
      end
      for item = at + head, at + head - 1 + items * 2, 2 do
        later_put(keys[4], keys[5], decimal(next_item), now, '0', args[item], args[item + 1])
        next_item = next_item + 1
      end
      letters = letters + 1
    end
    at = at + head + items * 2
  end
  local messages = next_item - first
  if letters > 0 then
    redis.call('HSET', keys[2], 'later_next', decimal(next_item), 'replayed',
      decimal((natural(state[3] or '') or 0) + messages))
    add(keys[1], 'fin:' .. args[1], decimal(-messages))
    redis.call('SPUBLISH', args[2], 'message')
  end
  return {'OK', letters}
end

-- purge: forgets dead letters.
-- KEYS   1 dead letters      ARGV   entry ids, at most 1000      reply  {'OK', dead letters forgotten}
local function purge(keys, args)
  if #keys ~= 1 or #args == 0 or #args > DEAD_AT_ONCE then return misuse('purge takes 1 key and 1 to 1000 entry ids') end
  for _, entry in ipairs(args) do
    if not entry_id(entry) then return misuse('purge was given what is no entry id') end
  end
  return {'OK', redis.call('XDEL', keys[1], unpack(args))}
end

redis.register_function('shardq_1_replay', guarded('hhszhzh', replay))
redis.register_function{function_name='shardq_1_purge', callback=purge, flags={'allow-oom'}}
