"""Taking a queue out of Redis, as Python calls (scripts/remove.lua). Decides nothing: runtime/removal.py does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardq.core.slots import key_slot
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys, ShardKeys, registry
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape

_MARK = "removing"  # field of the routing hash: the groups whose control hashes are still to go


@dataclass(frozen=True, slots=True)
class Removed:
    """`status` is OK, HELD (by `owner`, for `group`), CHANGED (there are groups that were not named) or ABSENT."""

    status: str
    owner: str = ""
    group: str = ""


async def remove_shard(pipes: Pipes, shard: ShardKeys, groups: Sequence[str], *, force: bool) -> Removed:
    """Deletes a shard's keys with those of its groups, all of which must be named."""
    keys = [shard.stream, shard.meta, shard.delayed, shard.expiring, shard.timed]
    for group in groups:
        keys += shard.of_group(group)
    reply = await pipes.call(shard.slot, "remove_shard", keys, [int(force), shard.bell, *groups])
    with shape("remove_shard"):
        removed = Removed(*(part.decode() for part in reply))
    if removed.status == "OK":  # they would go by themselves
        for group in groups:
            await pipes.command(shard.slot, pack_command("DEL", shard.limits(group)))
    return removed


async def marked_groups(pipes: Pipes, keys: Keys) -> set[str] | None:
    """The groups that a removal noted; None when the queue is not declared (any more)."""
    reply = await pipes.command(keys.control_slot, pack_command("HMGET", keys.routing, "version", _MARK))
    with shape("HMGET"):
        version, noted = reply
        return set((noted or b"").decode().split()) if version is not None else None


async def mark_groups(pipes: Pipes, keys: Keys, groups: Iterable[str]) -> None:
    """Notes the groups with the queue, so that a removal that is cut short finds them when it is repeated."""
    await pipes.command(keys.control_slot, pack_command("HSET", keys.routing, _MARK, " ".join(sorted(groups))))


async def forget_queue(pipes: Pipes, keys: Keys, groups: Iterable[str]) -> bool:
    """Takes the queue out of the list of queues, then its routing, schedules and groups' members, at once. False when
    there was nothing of the latter."""
    names = registry(keys.prefix)
    await pipes.command(key_slot(names.encode()), pack_command("SREM", names, keys.queue))
    own = [keys.routing, keys.schedules, *(keys.control(group) for group in sorted(groups))]
    return bool(await pipes.command(keys.control_slot, pack_command("DEL", *own)))
