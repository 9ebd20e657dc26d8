-- effect: the writes of handlers, run inside step with the acknowledgement of their message. Registers nothing.
-- Invariant: either all effects of a step are carried out, or none: what ran before one that Redis refuses is put back, with
-- its time to live. Messages to other queues are checked first, all of a step that go to one shard as one batch, and sent
-- last, when nothing can be refused any more: a send is never taken back.
-- An effect comes as: place of its key in KEYS, command, number of arguments, arguments. What is sent is the command SEND:
-- its key is the stream, behind which the meta of that shard stands in KEYS, its arguments are bell, messages, batch.

local EFFECT_KEYS = 8          -- keys of step itself, before those of effects
local EFFECT_ARGUMENTS = 4000  -- fewer than a Lua call takes

local effect_undo = {}  -- by command: what puts back what it is about to change in a key that exists, as a list of commands
local effect_field_ttl = true  -- until a server says that fields of its hashes have no time to live

local function effect_whole(key)
  return {{'RESTORE', key, '0', redis.call('DUMP', key), 'REPLACE'}}
end

local function effect_string(key)
  return {{'SET', key, redis.call('GET', key)}}
end

-- Strings are put back by SET: not every user may RESTORE.
local function effect_any(key)
  return (redis.call('TYPE', key).ok == 'string' and effect_string or effect_whole)(key)
end

effect_undo.SET, effect_undo.DEL = effect_any, effect_any
effect_undo.INCRBY, effect_undo.INCRBYFLOAT, effect_undo.APPEND = effect_string, effect_string, effect_string

function effect_undo.PEXPIRE(key) return {{'PERSIST', key}} end

-- When a field of a hash goes by itself, in Unix ms; nil when it does not.
local function effect_field_expires(key, field)
  if not effect_field_ttl then return nil end
  local reply = redis.pcall('HPEXPIRETIME', key, 'FIELDS', '1', field)
  if reply.err then
    effect_field_ttl = not string.find(reply.err, 'nknown')
    return nil
  end
  return reply[1] > 0 and decimal(reply[1]) or nil
end

local function effect_fields(key, fields)
  local back = {}
  for _, field in ipairs(fields) do
    local old = redis.call('HGET', key, field)
    back[#back + 1] = old and {'HSET', key, field, old} or {'HDEL', key, field}
    local expires = old and effect_field_expires(key, field)
    if expires then back[#back + 1] = {'HPEXPIREAT', key, expires, 'FIELDS', '1', field} end
  end
  return back
end

local function effect_every(args, first, width)
  local picked = {}
  for index = first, #args, width do picked[#picked + 1] = args[index] end
  return picked
end

function effect_undo.HSET(key, args) return effect_fields(key, effect_every(args, 1, 2)) end
function effect_undo.HDEL(key, args) return effect_fields(key, args) end
function effect_undo.HINCRBY(key, args) return effect_fields(key, {args[1]}) end
effect_undo.HINCRBYFLOAT = effect_undo.HINCRBY

local function effect_members(key, args)
  local back = {}
  for _, member in ipairs(args) do
    back[#back + 1] = {redis.call('SISMEMBER', key, member) == 1 and 'SADD' or 'SREM', key, member}
  end
  return back
end

effect_undo.SADD, effect_undo.SREM = effect_members, effect_members

local function effect_scores(key, members)
  local back = {}
  for _, member in ipairs(members) do
    local old = redis.call('ZSCORE', key, member)
    back[#back + 1] = old and {'ZADD', key, old, member} or {'ZREM', key, member}
  end
  return back
end

function effect_undo.ZADD(key, args) return effect_scores(key, effect_every(args, 2, 2)) end
function effect_undo.ZREM(key, args) return effect_scores(key, args) end
function effect_undo.ZINCRBY(key, args) return effect_scores(key, {args[2]}) end
function effect_undo.LPUSH(key, args) return {{'LPOP', key, decimal(#args)}} end
function effect_undo.RPUSH(key, args) return {{'RPOP', key, decimal(#args)}} end

-- What puts back what an effect is about to change. Raises what Redis refuses, an undoing that the user may not do too.
local function effect_back(key, command, args)
  local back, asked = {{'DEL', key}}, nil
  if redis.call('EXISTS', key) == 1 then
    back = effect_undo[command](key, args)
    local expires = redis.call('PEXPIRETIME', key)
    if expires > 0 then back[#back + 1] = {'PEXPIREAT', key, decimal(expires)} end -- its last item takes the key with it
  end
  for _, one in ipairs(back) do
    if one[1] ~= asked and not redis.acl_check_cmd(one[1], key) then
      error({err = 'NOPERM this user may not run ' .. one[1] .. ', which taking back ' .. command .. ' needs'})
    end
    asked = one[1]
  end
  return back
end

-- Carries out one effect. Returns what puts it back (nothing for the last one: nobody is refused behind it), or nil and why.
local function effect_run(key, command, args, last)
  local back = {}
  if not effect_undo[command] then return nil, 'this command is not one of the effects' end
  if not last then
    local ok, found = pcall(effect_back, key, command, args)
    if not ok then return nil, type(found) == 'table' and found.err or tostring(found) end
    back = found
  end
  local result = redis.pcall(command, key, unpack(args))
  if type(result) == 'table' and result.err then return nil, result.err end
  return back
end

-- Whether `count` messages can be sent to the shard whose stream stands at `place` in KEYS, its meta behind it; else why not.
local function effect_room(keys, place, count)
  local stream, meta = keys[place], keys[place + 1]
  if redis.call('TYPE', stream).ok ~= 'stream' or redis.call('TYPE', meta).ok ~= 'hash' then return 'MISSING' end
  local state = append_state(meta, 'state')
  if not state.name then return 'MISSING' end
  if state.name ~= 'open' then return 'SEALED' end
  if exhausted(stream) then return 'its stream has no ids left' end
  -- A shard that sends to itself is not held to its bound: the acknowledgements that would make room are in this very step.
  if stream == keys[1] or state.overflow == 'drop-oldest' then return nil end
  return append_overfull(stream, meta, state, count) and 'FULL' or nil
end

-- Checks what is sent to other queues. Returns as effect_all.
local function effect_check(keys, sends)
  local places, total, first = {}, {}, {}
  for _, send in ipairs(sends) do
    local place, count = send.place, natural(send.args[2] or '')
    if #send.args ~= 3 or not keys[place + 1] or not count or count == 0 or append_header(send.args[3]) ~= count then
      return send.number, 'not a batch'
    end
    if not total[place] then places[#places + 1], total[place], first[place] = place, 0, send.number end
    total[place] = total[place] + count
  end
  for _, place in ipairs(places) do
    local why = effect_room(keys, place, total[place])
    if why then return first[place], why end
  end
  return nil
end

local function effect_send(keys, send)
  local stream, meta, count = keys[send.place], keys[send.place + 1], natural(send.args[2])
  local state = append_state(meta, 'state')
  if state.overflow == 'drop-oldest' then append_fits(stream, meta, state, count) end
  append_entry(stream, state, count, send.args[3])
  redis.call('HSET', meta, 'appended', decimal(state.appended), 'bytes', decimal(state.bytes))
  append_ring(meta, state, send.args[1])
end

-- The effects that stand in args[first..]: those that are commands, and those that are sent.
local function effect_read(args, first, size)
  local at, writes, sends = first, {}, {}
  for number = 1, size do
    local count = natural(args[at + 2])
    local effect = {number = number, place = natural(args[at]), command = args[at + 1],
      args = {unpack(args, at + 3, at + 2 + count)}}
    local list = effect.command == 'SEND' and sends or writes
    list[#list + 1] = effect
    at = at + 3 + count
  end
  return writes, sends
end

-- Runs the effects that stand in args[first..], `size` of them. Returns nil when all ran, else the number of one that was
-- refused and why; then nothing has changed.
local function effect_all(keys, args, first, size)
  local writes, sends = effect_read(args, first, size)
  local refused, reason = effect_check(keys, sends)
  if refused then return refused, reason end
  local done = {}
  for index, write in ipairs(writes) do
    local back, why = effect_run(keys[write.place], write.command, write.args, index == #writes)
    if not back then
      for step = #done, 1, -1 do
        for _, one in ipairs(done[step]) do redis.call(unpack(one)) end
      end
      return write.number, why
    end
    done[index] = back
  end
  for _, send in ipairs(sends) do effect_send(keys, send) end
  return nil
end

-- The place behind `size` effects that begin at `first`, or nil when they are not well formed.
local function effect_end(keys, args, first, size)
  local at = first
  for _ = 1, size do
    local place, count = natural(args[at] or ''), natural(args[at + 2] or '')
    if not place or place <= EFFECT_KEYS or place > #keys then return nil end
    if not count or count > EFFECT_ARGUMENTS or at + 2 + count > #args then return nil end
    at = at + 3 + count
  end
  return at
end
