"""Deletes single messages, for compliance: nobody handles them afterwards, and their bytes leave Redis.

In three steps. Mark: from then on no group handles the message; copies of it (retries, dead letters) are emptied. Wait:
every worker that holds the shard has seen the mark. Redact: once every group has finished its entry the stream is
written without it; where that is not so yet, the shard's owner does it later (runtime/timekeeping.py).

What is not promised: a handler that runs at that moment is not stopped; files that Redis wrote before (AOF, RDB,
backups) hold the bytes until they are written anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import anyio

from shardq.core import records
from shardq.core.ids import MessageId
from shardq.core.intake import is_batch
from shardq.core.routing import RoutingTable
from shardq.errors import CorruptData, StoreTimeout, UnknownQueue, UsageError
from shardq.storage.calls import missing_shard
from shardq.storage.commands import pack_command
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import entries_of, shape

POLL_S = 0.05
_DELAYED = re.compile(r"(\d+)/(d\d+)/0")
_MARK = re.compile(rb"(\d+-\d+)/(\d+)")

Marks = frozenset[tuple[str, int]]


async def read_marks(pipes: Pipes, shard: ShardKeys, *, timeout_s: float = 10.0) -> tuple[bytes, Marks]:
    """The messages of a shard that are deleted and still stored, and the version of that list."""
    packed = pack_command("HMGET", shard.meta, "marks", "deleted")
    reply = await pipes.command(shard.slot, packed, timeout_s=timeout_s)
    with shape("HMGET"):
        version, deleted = reply
        found = _MARK.findall(deleted or b"")
        return version or b"", frozenset((entry.decode(), int(index)) for entry, index in found)


async def redact_marked(pipes: Pipes, shard: ShardKeys, marks: Iterable[tuple[str, int]]) -> bool:
    """Takes marked messages out of the entries that every group has finished; false when some entry has to wait."""
    by_entry: dict[str, set[int]] = {}
    for entry, index in marks:
        by_entry.setdefault(entry, set()).add(index)
    done = True
    for entry, indices in by_entry.items():
        done = await _redact(pipes, shard, entry, indices) and done
    return done


async def _redact(pipes: Pipes, shard: ShardKeys, entry: str, indices: set[int]) -> bool:
    stored = await pipes.command(shard.slot, pack_command("XRANGE", shard.stream, entry, entry))
    with shape("XRANGE"):
        found = entries_of(stored)
    rest = b""
    if found and is_batch(found[0][1]):
        try:
            raw = found[0][1][3]
            batch = records.decode(raw)
            for index in indices:
                batch = records.without(batch, index)
            rest = (
                records.encode(batch, records.compression_of(raw)) if len(batch.holes or ()) < len(batch.keys) else b""
            )
        except (CorruptData, IndexError):
            rest = b""  # what can't be read, nobody can read the rest of
    reply = await pipes.call(shard.slot, "redact", [shard.stream, shard.meta, shard.scratch], [entry, rest])
    with shape("redact"):
        return bool(reply[0] == b"OK")


async def delete_message(
    pipes: Pipes, table: RoutingTable, shards: dict[int, ShardKeys], message_id: str, timeout_s: float
) -> bool:
    """True when its bytes are gone, false when they go once every group has finished its entry.

    Raises UsageError when no such message is stored (any more), StoreTimeout when a worker did not confirm in time.
    """
    delayed = _DELAYED.fullmatch(str(message_id))
    if delayed is not None and table.home_of(int(delayed[1])) is not None:
        # A reshard moves it, under its name, to another shard of its home.
        homes = [shards[shard.id] for shard in table.relatives(int(delayed[1]))]
        await _forget(pipes, homes, delayed[2], message_id)
        return True
    where = MessageId.parse(message_id)
    if where.shard not in shards:
        msg = f"there is no shard {where.shard}: is {message_id} an id of another queue?"
        raise UsageError(msg)
    shard = shards[where.shard]
    groups = await _groups(pipes, shard)
    version = await _mark(pipes, shard, groups, where)
    with anyio.move_on_after(timeout_s) as limit:
        for group in groups:
            await _wait_for_owner(pipes, shard, group, version)
    if limit.cancelled_caught:
        msg = f"{message_id} is marked as deleted, but a worker did not confirm it in {timeout_s:g} s: delete it again"
        raise StoreTimeout(msg)
    return await redact_marked(pipes, shard, [(where.entry, where.index)])


async def _groups(pipes: Pipes, shard: ShardKeys) -> list[str]:
    reply = await pipes.command(shard.slot, pack_command("HMGET", shard.meta, "state", "groups"))
    with shape("HMGET"):
        missing, groups = reply[0] is None, (reply[1] or b"").decode().split()
    if missing:
        raise UnknownQueue(missing_shard(shard))
    return groups


async def _mark(pipes: Pipes, shard: ShardKeys, groups: list[str], where: MessageId) -> int:
    keys = [shard.stream, shard.meta]
    for group in groups:
        keys += [shard.dead(group), shard.kept(group)]
    reply = await pipes.call(shard.slot, "mark", keys, [where.shard, where.entry, where.index, shard.bell])
    with shape("mark"):
        version, stored, copies = int(reply[1]), reply[2] == b"1", int(reply[3])
    if not stored and not copies:
        await redact_marked(pipes, shard, [(where.entry, where.index)])  # takes the mark back
        msg = f"message {where} is not stored (any more): every group has finished it, or it never was"
        raise UsageError(msg)
    return version


async def _wait_for_owner(pipes: Pipes, shard: ShardKeys, group: str, version: int) -> None:
    """Until the lease is free (whoever takes it reads the marks first), or its holder has seen the mark."""
    packed = pack_command("HMGET", shard.group(group), "token", "marks")
    while True:
        reply = await pipes.command(shard.slot, packed)
        with shape("HMGET"):
            token, seen = reply
            if not token or (seen and seen.isdigit() and int(seen) >= version):
                return
        await anyio.sleep(POLL_S)


async def _forget(pipes: Pipes, shards: Sequence[ShardKeys], name: str, message_id: str) -> None:
    # Twice: it may move while the others are asked.
    for shard in (*shards, *(shards if len(shards) > 1 else ())):
        reply = await pipes.call(shard.slot, "forget", [shard.meta, shard.delayed, shard.timed], [name])
        with shape("forget"):
            if reply[0] == b"OK":
                return
    msg = f"{message_id} is not among the delayed messages (any more): if it was due, delete it by its message.id"
    raise UsageError(msg)
