"""Consumer groups of one shard as Python calls (scripts/group.lua). Decides nothing: what is done over all shards of a
queue, and when it is refused, is in runtime/groups.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardq.errors import UnknownQueue
from shardq.storage.calls import missing_shard
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape, text


@dataclass(frozen=True, slots=True)
class Start:
    """Where a group begins on one shard: "earliest", "latest", or an entry id, which means the first entry at or after
    it; `index` leaves out so many messages of exactly that entry."""

    entry: str = "earliest"
    index: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """`status` is CREATED or EXISTS (open_group), OK, HELD or ABSENT (the others); `backlog` is in messages, known when
    something was done; `owner` holds the lease when the status is HELD."""

    status: str
    backlog: int = 0
    owner: str = ""


async def open_group(pipes: Pipes, shard: ShardKeys, group: str, start: Start) -> Done:
    """Registers a group; one that exists stays where it is. Raises UnknownQueue when the shard's keys are gone."""
    keys = [shard.stream, shard.meta, *shard.of_group(group)]
    return await _call(pipes, shard, "open_group", keys, [group, start.entry, start.index])


async def reset_group(pipes: Pipes, shard: ShardKeys, group: str, start: Start, request: str, *, force: bool) -> Done:
    """Puts a group at `start`; what was in hand or waited is given up. Held leases refuse it unless `force`.

    `request` names this reset: a second call with the same name does nothing. Raises as open_group.
    """
    keys = [shard.stream, shard.meta, shard.group(group), shard.later(group), shard.kept(group)]
    args: list[str | bytes | int] = [group, request, int(force), start.entry, start.index, shard.bell]
    return await _call(pipes, shard, "reset_group", keys, args)


async def delete_group(pipes: Pipes, shard: ShardKeys, group: str, *, force: bool) -> Done:
    """Takes a group off the shard with all it has there. Held leases refuse it unless `force`."""
    keys = [shard.stream, shard.meta, *shard.of_group(group)]
    return await _call(pipes, shard, "delete_group", keys, [group, int(force), shard.bell])


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether a group is registered on a shard; `deleted` is what was noted when it was deleted, empty when nothing is:
    each deletion's note is another one."""

    registered: bool
    deleted: str = ""


async def group_standing(pipes: Pipes, shard: ShardKeys, group: str) -> Standing | None:
    """How a group stands on a shard; None when the shard's keys are gone."""
    packed = pack_command("HMGET", shard.meta, "state", "groups", f"gone:{group}")
    reply = await pipes.command(shard.slot, packed)
    with shape("HMGET"):
        state, groups, deleted = reply
        if state is None:
            return None
        return Standing(group.encode() in (groups or b"").split(), text(deleted or b"").decode(errors="replace"))


async def was_deleted(pipes: Pipes, shard: ShardKeys, group: str) -> bool:
    """Whether somebody deleted the group here, and nobody has opened it since."""
    return await pipes.command(shard.slot, pack_command("HGET", shard.meta, f"gone:{group}")) is not None


async def forget_members(pipes: Pipes, keys: Keys, group: str) -> bool:
    """Deletes a group's members, leader and plan; true when there were any."""
    deleted = await pipes.command(keys.control_slot, pack_command("DEL", keys.control(group)))
    return bool(deleted)


async def _call(
    pipes: Pipes, shard: ShardKeys, function: str, keys: Sequence[str], args: Sequence[str | bytes | int]
) -> Done:
    reply = await pipes.call(shard.slot, function, keys, args)
    with shape(function):
        status = reply[0].decode()
        more = reply[1].decode() if len(reply) > 1 else ""
        missing = status == "MISSING"
        done = Done(status, owner=more) if status == "HELD" else Done(status, int(more or 0))
    if missing:
        raise UnknownQueue(missing_shard(shard))
    return done
