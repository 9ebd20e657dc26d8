-- lease: who may consume one shard for one group. acquire, release, offer, ready, transfer.
-- Model: the lease is FREE (token '') or HELD by a token 'epoch:nonce'. The nonce belongs to one worker incarnation.
--   acquire   FREE -> HELD, or HELD -> HELD by another when nobody renewed since the taker looked
--   offer     names the heir of a HELD lease (coordinator)       ready   the heir says it is set up
--   transfer  HELD -> HELD by the heir, by the owner itself: no ownerless moment
--   release   HELD -> FREE by the owner itself
-- Invariants: the epoch rises at every change of owner and is never given a TTL. No wall clock decides expiry: the taker
-- says which (epoch, renewals) it saw a whole lease time ago on its own clock, and any renewal since refuses it. It also
-- says in which replication history it saw them: a promoted replica may lack renewals that its old master answered, so
-- after every promotion the taker has to look for a whole lease time anew.
-- A plan older than the newest seen is refused. A lease with a gate is granted to nobody before the group has finished
-- the shards that held this one's keys (see reshard.lua); then the gate opens for good. allow-oom on all: owners must be able to change on a full server.

local LEASE_FIELDS = {'token', 'epoch', 'nonce', 'owner', 'renewals', 'plan', 'heir', 'heir_nonce', 'heir_ready', 'step',
  'gate'}

local function lease_read(key)
  local lease, values = {}, redis.call('HMGET', key, unpack(LEASE_FIELDS))
  for index, name in ipairs(LEASE_FIELDS) do lease[name] = values[index] or '' end
  lease.exists = values[2] ~= false
  return lease
end

local function lease_grant(key, lease, owner, nonce)
  local epoch = next_term(lease.epoch)
  redis.call('HSET', key, 'token', epoch .. ':' .. nonce, 'epoch', epoch, 'nonce', nonce, 'owner', owner,
    'renewals', '0', 'step', '0', 'heir', '', 'heir_nonce', '', 'heir_ready', '')
  return epoch
end

-- Names this node's replication history; '' where the user may not ask.
local function lease_history()
  local info = redis.pcall('INFO', 'replication')
  return type(info) == 'string' and string.match(info, 'master_replid:(%x+)') or ''
end

-- The reply to who would own a shard whose gate is shut; nil when it is open, which it may be from this look on.
local function lease_gated(keys, args)
  if #keys == 1 then return {'GATED', '', '0'} end
  for id in string.gmatch(redis.call('HGET', keys[2], 'parents') or '', '%S+') do
    local place = nil
    for index = 9, #args do
      if args[index] == id then place = 3 * (index - 8) end
    end
    if not place then return {'GATED', id, '0'} end
    local left = reshard_left(keys[place], keys[place + 1], keys[place + 2], args[8])
    if left then return {'GATED', id, decimal(left)} end
  end
  redis.call('HSET', keys[1], 'gate', '')
  -- Sealed in turn meanwhile, and empty: nobody else will tell those who wait for this one.
  for channel in string.gmatch(redis.call('HGET', keys[2], 'children') or '', '%S+') do
    redis.call('SPUBLISH', channel, 'lease')
  end
  return nil
end

-- acquire: take the lease.
-- KEYS   1 group hash   and where the shard may have parents: 2 its meta   then of each parent: meta, group hash, later
-- ARGV   1 worker   2 its nonce   3 plan version   4 epoch seen   5 renewals seen   6 history seen ('' '' '' when nothing
--        was seen long enough)   7 bell channel   and with more keys: 8 group   then the parents' ids
-- reply  {'OK', epoch, last step number}   also when this nonce holds it already: counts as a renewal then, because
--        the owner trusts its lease from this acquire on, so whoever watches must start anew
--        {'HELD', epoch, renewals, owner, heir nonce, history}   {'OLDPLAN', newest}   {'MISSING'}
--        {'GATED', parent, messages}   the group has so much to do on that parent first; '0' when the parent was not named,
--        so the caller does not know the newest routing table
local function acquire(keys, args)
  local sound = #keys == 1 and #args == 7 or #args >= 8 and #keys == 2 + 3 * (#args - 8)
  if not sound or not natural(args[3]) then return misuse('acquire takes 1 key and 7 arguments, or more for parents') end
  local lease = lease_read(keys[1])
  if not lease.exists then return {'MISSING'} end
  if lease.token ~= '' and lease.nonce == args[2] then
    redis.call('HSET', keys[1], 'renewals', decimal((natural(lease.renewals) or 0) + 1))
    return {'OK', lease.epoch, lease.step}
  end
  if natural(args[3]) < (natural(lease.plan) or 0) then return {'OLDPLAN', lease.plan} end
  local gated = lease.gate == '1' and lease_gated(keys, args)
  if gated then return gated end
  if lease.token ~= '' then
    local history = lease_history()
    if lease.epoch ~= args[4] or lease.renewals ~= args[5] or history ~= args[6] then
      return {'HELD', lease.epoch, lease.renewals, lease.owner, lease.heir_nonce, history}
    end
  end
  redis.call('HSET', keys[1], 'plan', args[3])
  local epoch = lease_grant(keys[1], lease, args[1], args[2])
  redis.call('SPUBLISH', args[7], 'taken ' .. args[2]) -- the taker itself need not look
  return {'OK', epoch, '0'}
end

-- release: give the lease back.
-- KEYS   1 group hash      ARGV   1 token   2 bell channel      reply  {'OK'} | {'FENCED', epoch}
local function release(keys, args)
  if #keys ~= 1 or #args ~= 2 then return misuse('release takes 1 key and 2 arguments') end
  local lease = lease_read(keys[1])
  if lease.token == '' or lease.token ~= args[1] then return {'FENCED', lease.epoch} end
  redis.call('HSET', keys[1], 'token', '', 'nonce', '', 'owner', '', 'heir', '', 'heir_nonce', '', 'heir_ready', '')
  redis.call('SPUBLISH', args[2], 'lease')
  return {'OK'}
end

-- offer: name the heir, or withdraw the offer with an empty heir.
-- KEYS   1 group hash      ARGV   1 plan version   2 heir   3 heir's nonce   4 bell channel
-- reply  {'OK'}   {'FREE'} nobody holds it (or the hash is gone): acquire   {'OWNED'} the heir holds it already
--        {'OLDPLAN', newest}
local function offer(keys, args)
  if #keys ~= 1 or #args ~= 4 or not natural(args[1]) then return misuse('offer takes 1 key and 4 arguments') end
  local lease = lease_read(keys[1])
  if not lease.exists then return {'FREE'} end -- and write nothing: open_group takes a hash that exists for a group
  if natural(args[1]) < (natural(lease.plan) or 0) then return {'OLDPLAN', lease.plan} end
  redis.call('HSET', keys[1], 'plan', args[1])
  if lease.token == '' then return {'FREE'} end
  if lease.heir_nonce ~= args[3] and lease.nonce ~= args[3] then
    redis.call('HSET', keys[1], 'heir', args[2], 'heir_nonce', args[3], 'heir_ready', '')
    redis.call('SPUBLISH', args[4], 'lease')
  elseif lease.nonce == args[3] then
    if lease.heir_nonce ~= '' then redis.call('HSET', keys[1], 'heir', '', 'heir_nonce', '', 'heir_ready', '') end
    return {'OWNED'}
  end
  return {'OK'}
end

-- ready: the heir is connected and set up; the owner may stop fetching and hand over.
-- KEYS   1 group hash      ARGV   1 heir's nonce   2 bell channel      reply  {'OK'} | {'NOHEIR'}
local function ready(keys, args)
  if #keys ~= 1 or #args ~= 2 or args[1] == '' then return misuse('ready takes 1 key and 2 arguments') end
  local lease = lease_read(keys[1])
  if lease.token == '' or lease.heir_nonce ~= args[1] then return {'NOHEIR'} end
  if lease.heir_ready ~= '1' then
    redis.call('HSET', keys[1], 'heir_ready', '1')
    redis.call('SPUBLISH', args[2], 'lease')
  end
  return {'OK'}
end

-- transfer: the owner, all committed, hands the lease to the heir that said ready.
-- KEYS   1 group hash      ARGV   1 token   2 bell channel
-- reply  {'OK', new epoch} | {'NOHEIR'} the offer was withdrawn: keep the lease | {'FENCED', epoch}
local function transfer(keys, args)
  if #keys ~= 1 or #args ~= 2 then return misuse('transfer takes 1 key and 2 arguments') end
  local lease = lease_read(keys[1])
  if lease.token == '' or lease.token ~= args[1] then return {'FENCED', lease.epoch} end
  if lease.heir_ready ~= '1' or lease.heir_nonce == '' then return {'NOHEIR'} end
  local epoch = lease_grant(keys[1], lease, lease.heir, lease.heir_nonce)
  redis.call('SPUBLISH', args[2], 'lease')
  return {'OK', epoch}
end

redis.register_function{function_name='shardq_1_acquire', callback=acquire, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_release', callback=release, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_offer', callback=offer, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_ready', callback=ready, flags={'allow-oom'}}
redis.register_function{function_name='shardq_1_transfer', callback=transfer, flags={'allow-oom'}}
