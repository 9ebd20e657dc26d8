"""Changing the number of shards of a queue that is in use: the steps in Redis, in the order that keeps every promise.

A plan (core/reshard.py) is noted with the queue before anything else, so that whoever finds it can carry it on: who
began it, the leader of a group, another operator. Every step is safe to repeat, also by several at once.

  begin       the plan is noted; one at a time
  open        the children are made, with the groups of their parents, their gates shut: no group owns a child before it
              has finished every retired shard that held keys of it
  commit      from here on the plan is carried out; before, it may be given up
  seal        the parents take no more messages, all side by side. Before the table: two producers, one with the old
              table, can't store messages of one key on parent and child in turn. After the children: what a sealed
              shard refuses has somewhere to go
  groups      those that were opened on the parents meanwhile are opened on the children
  publish     the table that follows, and a ring at every group's bell. Producers could read it in the plan as soon as
              they are refused, and save a call; they must not, before `groups`: what they store on a child
              might be finished by every group there, and trimmed, before one that was opened late is
  move        messages that are not due yet go to the children

Much later, when no group has anything left to do there and no producer may ask again for an answer, a retired shard
goes: marked in its own slot, then forgotten in the table, then its keys deleted (`look_after`).

Invariants: a sealed shard's children are open. A message is stored on the shard that the newest table, or the one
before it, names for its key. Nobody decides here which shards there should be.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from shardq.core import records
from shardq.core.hashing import key_hash
from shardq.core.queue_settings import QueueSettings
from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable, Shard
from shardq.errors import CorruptData, ReshardUnderWay, UnknownQueue
from shardq.runtime.outgrown import LAST_ENTRY, outgrown
from shardq.runtime.tasks import task_group
from shardq.storage import calls, groups, queues, reshard
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes

Item = TypeVar("Item")

_TRIES = 10
_DELAYED = re.compile(r"d[0-9]+")


# -- beginning and carrying on -----------------------------------------------------------------------------------------


async def begin(pipes: Pipes, keys: Keys, plan: Reshard) -> None:
    """Notes the plan. Raises ReshardUnderWay when there is another one, or the shards are others than it was made for;
    UnknownQueue when the queue is gone."""
    status, _ = await reshard.begin(pipes, keys, plan)
    if status == "MISSING":
        raise _gone(keys)
    if status == "BUSY":
        msg = f"another reshard of queue {keys.queue!r} is under way: see `shardq queue show`, then repeat this"
        raise ReshardUnderWay(msg)
    if status == "CHANGED":
        stored = await queues.stored_queue(pipes, keys)
        # The very table of the plan: somebody carried it out while the answer was lost.
        if stored is None or stored.table != plan.table.to_bytes():
            msg = f"the shards of queue {keys.queue!r} changed meanwhile: see `shardq queue show`, then repeat this"
            raise ReshardUnderWay(msg)


async def carry_on(pipes: Pipes, keys: Keys) -> bool:
    """Carries out the plan that is under way; false when there is none. Safe to call at any time, by anyone. Raises
    StoreError, CorruptData, UnknownQueue."""
    stored = await queues.stored_queue(pipes, keys)
    if stored is None:
        raise _gone(keys)
    if not stored.reshard:
        return False
    work = Work(pipes, keys, stored.reshard)
    for step in STEPS:
        if not await step(work):
            break
    return True


async def give_up(pipes: Pipes, keys: Keys) -> bool:
    """Gives up the plan that is under way, as long as nothing was sealed for it; false when there is none. Raises
    ReshardUnderWay when it is too late: then it is carried out."""
    stored = await queues.stored_queue(pipes, keys)
    if stored is None:
        raise _gone(keys)
    if not stored.reshard:
        return False
    plan = Reshard.from_bytes(stored.reshard)
    leaving = [child.id for child in plan.children]
    status = await reshard.end(pipes, keys, stored.reshard, plan.given_up(), given_up=True, leaving=leaving)
    if status == "HELD":
        msg = f"the reshard of queue {keys.queue!r} can't be given up any more: it is carried out within seconds"
        raise ReshardUnderWay(msg)
    await delete_leaving(pipes, keys)
    return status == "OK"


class Work:
    """One plan as it is carried out by somebody."""

    def __init__(self, pipes: Pipes, keys: Keys, stored: bytes) -> None:
        self.pipes, self.keys, self.stored = pipes, keys, stored
        self.plan = Reshard.from_bytes(stored)
        self.shards = {shard.id: keys.of(shard) for shard in self.plan.table.by_id.values()}
        self.groups: set[str] = set()

    @property
    def parents(self) -> dict[int, list[ShardKeys]]:
        """The children of each parent."""
        return {parent: [self.shards[child] for child in self.plan.children_of(parent)] for parent in self.plan.parents}

    async def settings(self) -> tuple[int, QueueSettings]:
        stored = await queues.stored_queue(self.pipes, self.keys)
        if stored is None:
            raise _gone(self.keys)
        return stored.settings_version, QueueSettings.from_bytes(stored.settings)


async def open_children(work: Work) -> bool:
    version, settings = await work.settings()

    async def one(child: Shard) -> None:
        held_its_keys = [each.id for each in work.plan.table.ancestors(child.id)]
        limits = settings.for_range(child.low, child.high)
        await reshard.open_child(work.pipes, work.shards[child.id], held_its_keys, version, limits)

    await _each(one, work.plan.children)
    return await open_groups(work)


async def open_groups(work: Work) -> bool:
    """Opens the groups of each parent on its children."""
    wanted: dict[int, set[str]] = {}

    async def look(parent: int) -> None:
        found = await reshard.groups_of(work.pipes, work.shards[parent]) or set()
        for child in work.plan.children_of(parent):
            wanted.setdefault(child, set()).update(found)

    async def open_one(pair: tuple[int, str]) -> None:
        await groups.open_group(work.pipes, work.shards[pair[0]], pair[1], groups.Start())

    await _each(look, work.plan.parents)
    await _each(open_one, [(child, group) for child, names in wanted.items() for group in sorted(names)])
    work.groups = {group for names in wanted.values() for group in names}
    await _each(lambda child: _delete_groups_that_went(work, child.id), work.plan.children)
    return True


async def _delete_groups_that_went(work: Work, child: int) -> None:
    """Of a child, those that were deleted on its parents since somebody read there what to open: who deletes a group
    does so on the old shards first, then on the new ones (runtime/queue_groups.py)."""
    parents = [parent for parent in work.plan.parents if child in work.plan.children_of(parent)]
    there: set[str] = set()
    for parent in parents:
        there |= await reshard.groups_of(work.pipes, work.shards[parent]) or set()
    for group in sorted((await reshard.groups_of(work.pipes, work.shards[child]) or set()) - there):
        for parent in parents:
            if await groups.was_deleted(work.pipes, work.shards[parent], group):
                await groups.delete_group(work.pipes, work.shards[child], group, force=False)
                break


async def commit(work: Work) -> bool:
    """False when the plan is not under way any more: it was given up, or somebody was faster."""
    if await reshard.commit(work.pipes, work.keys, work.stored):
        return True
    # Whoever slept before it opened a child may have done so after its keys were deleted: no table would name them.
    table = await read_table(work.pipes, work.keys)
    await _each(lambda id_: _delete_keys(work.pipes, work.shards[id_]), _unnamed(work.plan, table))
    return False


def _unnamed(plan: Reshard, table: RoutingTable) -> list[int]:
    """Children that were, and are not any more."""
    past = dict(table.removed)
    return [child.id for child in plan.children if child.id in past]


async def seal(work: Work) -> bool:
    parents = work.parents
    await _each(lambda parent: reshard.seal(work.pipes, work.shards[parent], parents[parent]), parents)
    return True


async def open_late_groups(work: Work) -> bool:
    """What was opened, or changed, between the first look and the seal."""
    version, settings = await work.settings()

    async def tune(child: Shard) -> None:
        limits = settings.for_range(child.low, child.high)
        await queues.tune(work.pipes, work.shards[child.id], version, limits)

    await _each(tune, work.plan.children)
    return await open_groups(work)


async def publish(work: Work) -> bool:
    bells = [work.keys.control_bell(group) for group in sorted(work.groups)]
    return await reshard.end(work.pipes, work.keys, work.stored, work.plan.table, bells=bells) == "OK"


async def move(work: Work) -> bool:
    await _each(lambda parent: move_delayed(work.pipes, work.keys, work.plan.table, parent), work.plan.parents)
    return True


STEPS: tuple[Callable[[Work], Awaitable[bool]], ...] = (
    open_children,
    commit,
    seal,
    open_late_groups,
    publish,
    move,
)
"""What `carry_on` does with a plan that is noted; a step that returns false ends it."""


async def move_delayed(pipes: Pipes, keys: Keys, table: RoutingTable, shard: int) -> None:
    """Hands messages of a retired shard that are not due yet to the active ones that have their keys."""
    own, parent = table.by_id[shard], keys.of(table.by_id[shard])
    heirs = [each for each in table.homes[own.home_id] if each.overlaps(own)]
    places = {heir.id: place for place, heir in enumerate(heirs)}
    targets = [keys.of(heir) for heir in heirs]
    bells = [target.bell for target in targets]
    skipped, left = 0, 1
    while left > skipped:
        found = await reshard.delayed_batches(pipes, parent, skipped)
        if not found:
            return
        moves = [(name, places.get(_heir(table, raw), 0)) for name, raw in found if _DELAYED.fullmatch(name)]
        skipped += len(found) - len(moves)
        left = await reshard.move_delayed(pipes, parent, targets, moves, bells)


def _heir(table: RoutingTable, batch: bytes | None) -> int:
    """The active shard that a batch of one message goes to; -1 when that is all the same."""
    try:
        key = records.decode(batch).keys[0] if batch else None
    except (CorruptData, IndexError):
        return -1
    return table.shard_for(key_hash(key)).id if key is not None else -1


# -- what the leader of a group looks after ----------------------------------------------------------------------------


async def look_after(pipes: Pipes, keys: Keys) -> dict[int, reshard.Retired]:
    """What is left to do when a table is published: moves delayed messages that wait on retired shards, removes those
    retired shards that nobody needs any more, and deletes keys that a removal left behind. Returns why the others stay.

    Safe to call at any time, by anyone. Raises StoreError, CorruptData, UnknownQueue.
    """
    table = await read_table(pipes, keys)
    await delete_leaving(pipes, keys)
    stay: dict[int, reshard.Retired] = {}
    for each in table.retired:
        shard = each.shard.id
        try:
            await move_delayed(pipes, keys, table, shard)
            done = await _retire(pipes, keys, table, shard)
            if done.why == "stored" and await outgrown(pipes, keys, table, shard):
                await calls.trim(pipes, keys.of(each.shard), LAST_ENTRY)
                done = await _retire(pipes, keys, table, shard)
        except UnknownQueue:
            done = reshard.Retired("MISSING")  # a removal that was cut short, or lost data: nothing is left to wait for
        if done.status in ("OK", "MISSING"):
            after = table.without(shard)
            if not await reshard.forget_shard(pipes, keys, table, after, shard):
                break  # somebody else changes the table: the next call goes on
            table = after
            await delete_leaving(pipes, keys)
        else:
            stay[shard] = done
    return stay


async def read_table(pipes: Pipes, keys: Keys) -> RoutingTable:
    """The routing table that is stored. Raises UnknownQueue."""
    stored = await queues.stored_queue(pipes, keys)
    if stored is None:
        raise _gone(keys)
    return RoutingTable.from_bytes(stored.table)


async def _retire(pipes: Pipes, keys: Keys, table: RoutingTable, shard: int) -> reshard.Retired:
    own = table.by_id[shard]
    heirs = [keys.of(each) for each in table.relatives(shard) if each.id > shard and each.overlaps(own)]
    for _ in range(_TRIES):
        names = await reshard.groups_of(pipes, keys.of(own))
        if names is None:
            return reshard.Retired("MISSING")
        done = await reshard.retire(pipes, shard, keys.of(own), sorted(names), heirs)
        if done.why == "open":  # a failover took the seal back
            await reshard.seal(pipes, keys.of(own), [keys.of(each) for each in table.shards if _took_over(each, own)])
            continue
        if done.status != "CHANGED":
            return done
    return reshard.Retired("BUSY", "groups")


def _took_over(child: Shard, own: Shard) -> bool:
    return child.home_id == own.home_id and child.overlaps(own)


async def delete_leaving(pipes: Pipes, keys: Keys) -> None:
    """Deletes the keys of shards that no table names any more. Safe to repeat, by anyone. Raises UnknownQueue."""
    leaving = await reshard.leaving(pipes, keys)
    if not leaving:
        return
    table = await read_table(pipes, keys)  # after the notes: an older table may not know of what somebody gave up since
    for shard in leaving:
        relatives = table.relatives(shard)
        if relatives and not await _delete_keys(pipes, keys.shard(shard, relatives[0].tag, relatives[0].home_id)):
            continue
        await reshard.left(pipes, keys, shard)


async def _delete_keys(pipes: Pipes, shard: ShardKeys) -> bool:
    for _ in range(_TRIES):
        names = sorted(await reshard.groups_of(pipes, shard) or ())
        status = await reshard.remove_retired(pipes, shard, names, unused=True)
        if status != "CHANGED":
            return status in ("OK", "ABSENT")
    return False


# -- shared -----------------------------------------------------------------------------------------------------------


async def _each(do: Callable[[Item], Awaitable[object]], items: Iterable[Item]) -> None:
    async def one(item: Item) -> None:
        await do(item)

    async with task_group() as tasks:
        for item in items:
            tasks.start_soon(one, item)


def _gone(keys: Keys) -> UnknownQueue:
    return UnknownQueue(f"queue {keys.queue!r} does not exist (any more)")
