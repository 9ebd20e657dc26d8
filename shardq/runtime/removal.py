"""Removing a queue: every shard with its messages and groups, then what stands beside the shards, its routing last, so
that a removal that was cut short can be repeated. Never touches what handlers keep on a shard (message.local_key).
"""

from __future__ import annotations

from collections.abc import Mapping

from shardq.errors import GroupInUse, UnknownQueue
from shardq.runtime.tasks import task_group
from shardq.storage import removal
from shardq.storage.control import control_state
from shardq.storage.counters import ShardCounters, inspect
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.removal import Removed

_TRIES = 10
_STOP_FIRST = "Stop its workers and coordinators first; force=True (--force) is for those that were killed"


async def remove_queue(pipes: Pipes, keys: Keys, shards: Mapping[int, ShardKeys], *, force: bool) -> None:
    """Raises GroupInUse while workers hold shards or are members of a group, UnknownQueue when nothing was there."""
    for _ in range(_TRIES):
        marked = await removal.marked_groups(pipes, keys)
        found = await _look(pipes, shards)
        if marked is None and not found:
            break
        groups = {group for counters in found.values() for group in counters.registered} | (marked or set())
        if not force:
            await _refuse_if_used(pipes, keys, shards, groups)
        if marked is not None and groups != marked:
            await removal.mark_groups(pipes, keys, groups)
        done = await _remove_shards(pipes, shards, sorted(groups), force=force)
        _refuse_rest(keys, done)
        if all(each.status != "CHANGED" for each in done.values()):
            await removal.forget_queue(pipes, keys, groups)
            return
    else:
        msg = f"queue {keys.queue!r} gets new groups all the time: stop what opens them, then delete it again"
        raise GroupInUse(msg)
    msg = f"queue {keys.queue!r} does not exist (any more)"
    raise UnknownQueue(msg)


async def _look(
    pipes: Pipes, shards: Mapping[int, ShardKeys], groups: tuple[str, ...] = ()
) -> dict[int, ShardCounters]:
    """The counters of the shards that are there."""
    found: dict[int, ShardCounters] = {}

    async def one(shard: int) -> None:
        try:
            found[shard] = await inspect(pipes, shards[shard], groups)
        except UnknownQueue:
            return  # an earlier try removed it

    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(one, shard)
    return dict(sorted(found.items()))


async def _refuse_if_used(pipes: Pipes, keys: Keys, shards: Mapping[int, ShardKeys], groups: set[str]) -> None:
    for shard, counters in (await _look(pipes, shards, tuple(sorted(groups)))).items():
        for name, group in counters.groups.items():
            if group.held:
                used = f"worker {group.owner} holds shard {shard} for group {name!r}"
                raise GroupInUse(f"queue {keys.queue!r} is in use, nothing was changed: {used}. {_STOP_FIRST}")
    for group_name in sorted(groups):
        members = sorted((await control_state(pipes, keys, group_name)).members)
        if members:
            used = f"{members[0]} is a member of group {group_name!r}"
            raise GroupInUse(f"queue {keys.queue!r} is in use, nothing was changed: {used}. {_STOP_FIRST}")


async def _remove_shards(
    pipes: Pipes, shards: Mapping[int, ShardKeys], groups: list[str], *, force: bool
) -> dict[int, Removed]:
    done: dict[int, Removed] = {}

    async def one(shard: int) -> None:
        done[shard] = await removal.remove_shard(pipes, shards[shard], groups, force=force)

    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(one, shard)
    return dict(sorted(done.items()))


def _refuse_rest(keys: Keys, done: Mapping[int, Removed]) -> None:
    """A worker came between the look at all shards and the removal."""
    held = {shard: each for shard, each in done.items() if each.status == "HELD"}
    if held:
        shard, first = next(iter(held.items()))
        gone = sum(each.status in ("OK", "ABSENT") for each in done.values())
        raise GroupInUse(
            f"a worker came while queue {keys.queue!r} was deleted: {gone} of {len(done)} shards are "
            f"gone, worker {first.owner} holds shard {shard} for group {first.group!r}. {_STOP_FIRST}; then repeat this"
        )
