-- delete: takes single messages out of a shard, and their bytes out of Redis. mark, redact, forget.
-- A message that some group has not finished is marked first (meta field `deleted`: '<entry>/<index>' by spaces; `marks`
-- counts the changes): owners finish it unhandled. Its bytes leave the stream in redact, once every group has finished its
-- entry; copies of it that a group keeps (retries, dead letters) leave at once.
-- Invariants: every other message of the batch keeps its id and stays readable; positions, pending entries and their
-- delivery counts are as before. Each is safe to repeat.

local function delete_marks(meta)
  local marks = {}
  for mark in string.gmatch(redis.call('HGET', meta, 'deleted') or '', '%S+') do marks[#marks + 1] = mark end
  return marks
end

local function delete_unpacked(record)
  local ok, value = pcall(cmsgpack.unpack, record)
  return ok and type(value) == 'table' and value or {}
end

-- Empties a group's kept record of the message; its owner finishes it unhandled when it comes to it.
local function delete_kept(kept, entry, index)
  local found = 0
  for _, item in ipairs(redis.call('HKEYS', kept)) do
    local record = item ~= '' and redis.call('HGET', kept, item) or ''
    local value = record ~= '' and delete_unpacked(record) or {}
    if value[1] == entry and value[2] == index then
      redis.call('HSET', kept, item, '')
      found = found + 1
    end
  end
  return found
end

local function delete_dead(dead, id)
  local found, from = 0, '-'
  while true do
    local letters = redis.call('XRANGE', dead, from, '+', 'COUNT', 100)
    if #letters == 0 then return found end
    for _, letter in ipairs(letters) do
      if delete_unpacked(letter[2][4] or '').id == id then found = found + redis.call('XDEL', dead, letter[1]) end
    end
    if letters[#letters][1] == LAST_ID then return found end
    from = '(' .. letters[#letters][1]
  end
end

-- mark: from now on no group handles the message.
-- KEYS   1 stream   2 meta   then for each group: dead letters, kept
-- ARGV   1 shard   2 entry   3 index   4 bell channel
-- reply  {'OK', version of the marks, '1' when its entry is stored else '0', copies erased} | {'MISSING'}
local function mark(keys, args)
  local index = natural(args[3] or '')
  if #keys < 2 or #keys % 2 ~= 0 or #args ~= 4 or not index or not entry_id(args[2]) then
    return misuse('mark takes 2 keys, 2 a group, 4 arguments')
  end
  if redis.call('EXISTS', keys[2]) == 0 then return {'MISSING'} end
  local copies = 0
  for place = 3, #keys, 2 do
    copies = copies + delete_dead(keys[place], args[1] .. '/' .. args[2] .. '/' .. args[3])
    copies = copies + delete_kept(keys[place + 1], args[2], index)
  end
  local stored = #redis.call('XRANGE', keys[1], args[2], args[2]) > 0
  local marks, name = delete_marks(keys[2]), args[2] .. '/' .. args[3]
  for _, known in ipairs(marks) do
    if known == name then return {'OK', redis.call('HGET', keys[2], 'marks'), stored and '1' or '0', copies} end
  end
  -- Also when its entry is gone: a copy may be in an owner's hands.
  marks[#marks + 1] = name
  redis.call('HSET', keys[2], 'deleted', table.concat(marks, ' '))
  local version = decimal(add(keys[2], 'marks', 1))
  redis.call('SPUBLISH', args[4], 'message')
  return {'OK', version, stored and '1' or '0', copies}
end

local function delete_unmark(meta, entry)
  local rest = {}
  for _, name in ipairs(delete_marks(meta)) do
    if string.sub(name, 1, #entry + 1) ~= entry .. '/' then rest[#rest + 1] = name end
  end
  if #rest > 0 then
    redis.call('HSET', meta, 'deleted', table.concat(rest, ' '))
  else
    redis.call('HDEL', meta, 'deleted')
  end
end

-- Whether some group may still have to handle messages of the entry.
local function delete_unfinished(stream, entry)
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info = {}
    for index = 1, #flat, 2 do info[flat[index]] = flat[index + 1] end
    if id_less(info['last-delivered-id'], entry) then return true end
    if #redis.call('XPENDING', stream, info['name'], entry, entry, 1) > 0 then return true end
  end
  return false
end

local function delete_copy_groups(stream, scratch)
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info, from = {}, '-'
    for index = 1, #flat, 2 do info[flat[index]] = flat[index + 1] end
    redis.call('XGROUP', 'CREATE', scratch, info['name'], info['last-delivered-id'])
    while true do
      local pending = redis.call('XPENDING', stream, info['name'], from, '+', 1000)
      if #pending == 0 then break end
      for _, one in ipairs(pending) do
        redis.call('XCLAIM', scratch, info['name'], one[2], 0, one[1], 'IDLE', one[3], 'RETRYCOUNT', one[4], 'FORCE', 'JUSTID')
      end
      if pending[#pending][1] == LAST_ID then break end
      from = '(' .. pending[#pending][1]
    end
  end
end

-- redact: replaces the batch of an entry that every group has finished by one without the deleted messages. The stream is
-- written anew, entry by entry, for Redis can't change one: the shard stands still meanwhile (about a second for a GB).
-- KEYS   1 stream   2 meta   3 scratch stream      ARGV   1 entry   2 the batch without them, '' to drop the entry
-- reply  {'OK'} done, or the entry is gone   {'UNFINISHED'} some group has not finished it: nothing was done
local function redact(keys, args)
  if #keys ~= 3 or #args ~= 2 or not entry_id(args[1]) then return misuse('redact takes 3 keys and 2 arguments') end
  local stream, meta, scratch, entry = keys[1], keys[2], keys[3], args[1]
  if #redis.call('XRANGE', stream, entry, entry) == 0 then
    delete_unmark(meta, entry)
    return {'OK'}
  end
  if delete_unfinished(stream, entry) then return {'UNFINISHED'} end
  if args[2] == '' then
    local count, at = entry_count(redis.call('XRANGE', stream, entry, entry)[1][2])
    if at then add(meta, 'erased', count) end -- a group that begins before it has to know of the hole
    redis.call('XDEL', stream, entry)
  else
    redis.call('DEL', scratch)
    local from = '-'
    while true do
      local entries = redis.call('XRANGE', stream, from, '+', 'COUNT', 100)
      if #entries == 0 then break end
      for _, one in ipairs(entries) do
        if one[1] == entry then one[2][4] = args[2] end
        redis.call('XADD', scratch, one[1], unpack(one[2]))
      end
      if entries[#entries][1] == LAST_ID then break end
      from = '(' .. entries[#entries][1]
    end
    local flat, info = redis.call('XINFO', 'STREAM', stream), {}
    for index = 1, #flat, 2 do info[flat[index]] = flat[index + 1] end
    redis.call('XSETID', scratch, info['last-generated-id'])
    delete_copy_groups(stream, scratch)
    redis.call('RENAME', scratch, stream)
  end
  delete_unmark(meta, entry)
  return {'OK'}
end

-- forget: a delayed message that is not due yet.
-- KEYS   1 meta   2 delayed   3 timed      ARGV   1 its name, 'd<n>'      reply  {'OK'} | {'GONE'} it is due already, or never was
local function forget(keys, args)
  if #keys ~= 3 or #args ~= 1 or not string.match(args[1], '^d%d+$') then return misuse('forget takes 3 keys and a name') end
  if redis.call('ZREM', keys[2], args[1]) == 0 then return {'GONE'} end
  redis.call('HDEL', keys[3], args[1])
  redis.call('HSET', keys[1], 'delayed', decimal(redis.call('ZCARD', keys[2]) - 1))
  return {'OK'}
end

redis.register_function('shardq_1_mark', guarded('shshshshshshshshshshshshshshshsh', mark))
redis.register_function('shardq_1_redact', guarded('sh', redact))
redis.register_function{function_name='shardq_1_forget', callback=guarded('hzh', forget), flags={'allow-oom'}}
