"""What is left to do of changes of the number of shards, read and put into words. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.errors import UnknownQueue
from shardq.runtime.tasks import task_group
from shardq.storage.counters import GroupCounters, ShardCounters, inspect
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.queues import Declared


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A group that has messages to do on a retired shard, of which it handles those before any on the children.

    backlog   messages it has not finished there, `waiting` of them for a retry
    """

    group: str
    shard: int
    backlog: int
    waiting: int


@dataclass(frozen=True, slots=True)
class ReshardState:
    """A reshard at one moment.

    phase        "opening" (it is noted, and may be given up), "sealing" (it is carried out, producers wait), "draining"
                 (done for producers; groups finish the parents first), "retired" (done for everybody; the parents go
                 when nothing of theirs is needed any more, see `stay`)
    parents      shards that are sealed, or about to be
    unfinished   groups that have messages to do on them
    delayed      messages that are still to be moved, by parent
    stay         why each parent is still there, by parent
    """

    phase: str
    parents: tuple[int, ...]
    unfinished: tuple[Unfinished, ...]
    delayed: dict[int, int]
    stay: dict[int, str]


def state_of(plan: Reshard | None, counters: dict[int, ShardCounters], *, committed: bool) -> ReshardState | None:
    """The state of the plan under way, and of the retired shards with these counters; None when there is neither."""
    if plan is None and not counters:
        return None
    unfinished = tuple(
        Unfinished(name, shard, backlog, group.waiting)
        for shard, found in counters.items()
        for name, group in found.groups.items()
        if (backlog := backlog_of(found, group)) > 0
    )
    delayed = {shard: found.delayed for shard, found in counters.items() if found.delayed}
    phase = "draining" if unfinished or delayed else "retired"
    if plan is not None:
        phase = "sealing" if committed else "opening"
    parents = sorted({*counters, *(plan.parents if plan is not None else ())})
    stay = {shard: why_it_stays(found) for shard, found in counters.items()}
    return ReshardState(phase, tuple(parents), unfinished, delayed, stay)


def why_it_stays(shard: ShardCounters) -> str:
    """What a retired shard waits for, in words."""
    names = sorted(name for name, group in shard.groups.items() if backlog_of(shard, group) > 0)
    if names:
        return f"messages that {_groups(names)} not finished"
    names = sorted(name for name, group in shard.groups.items() if group.dead_letters)
    if names:
        return f"dead letters of group{'s' * (len(names) > 1)} {_named(names)}: replay or purge them"
    if shard.delayed:
        return "delayed messages that are to be moved"
    if shard.entries:
        return "messages that are kept: a group has to finish them, or their retention to pass"
    return "producers, which may ask for an answer for an hour; then a leader removes it"


def _groups(names: list[str]) -> str:
    return f"group {names[0]} has" if len(names) == 1 else f"groups {_named(names)} have"


def _named(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def backlog_of(shard: ShardCounters, group: GroupCounters) -> int:
    """Messages that a group has not finished on a shard."""
    finished = group.base + group.acked + group.dead - group.replayed
    return shard.appended + group.foreign - finished - group.skip


async def read_state(pipes: Pipes, keys: Keys, stored: Declared) -> ReshardState | None:
    """The state of a queue's reshards, with what is stored of the queue; None when nothing is left of any."""
    table = RoutingTable.from_bytes(stored.table)
    plan = Reshard.from_bytes(stored.reshard) if stored.reshard else None
    found: dict[int, ShardCounters] = {}

    async def look(number: int, shard: ShardKeys) -> None:
        try:
            names = (await inspect(pipes, shard, ())).registered
            found[number] = await inspect(pipes, shard, names)
        except UnknownQueue:
            return  # it is gone by now

    async with task_group() as tasks:
        for each in table.retired:
            tasks.start_soon(look, each.shard.id, keys.of(each.shard))
    return state_of(plan, dict(sorted(found.items())), committed=stored.committed)
