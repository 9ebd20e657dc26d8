"""How a process learns that its group, or its queue, was deleted though it has no shard that it would miss. A
coordinator of its own looks now and then at one shard; members look when what they joined is gone, and when the last
one goes (member.py). Deletes nothing and opens nothing.

A deletion leaves a note on every shard that had the group (`gone:`, scripts/group.lua). A group that was never there is
waited for, and so is one that was deleted before this coordinator came: a worker will open it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shardq.errors import CorruptData, StoreError, UnknownQueue
from shardq.runtime.contact import Contact, group_gone
from shardq.runtime.outages import Outages
from shardq.runtime.queue import Queue
from shardq.storage.groups import Standing, group_standing
from shardq.storage.pipes import Pipes
from shardq.storage.queues import read_changes

LOOK_EVERY_S = 2.0


async def standing_of(pipes: Pipes, queue: Queue, group: str) -> Standing | None:
    """How the group stands, by the queue's first shard; None when a master lost what it had of that. Raises
    UnknownQueue when there is no queue any more; StoreError, CorruptData."""
    await read_changes(pipes, queue.keys)
    return await group_standing(pipes, queue.shards[queue.table.shards[0].id], group)


async def may_be_there(pipes: Pipes, queue: Queue, group: str) -> bool:
    """Whether the group is there; also where that can't be told from what is stored. Raises as standing_of, but for the
    queue: without one there is no group."""
    try:
        standing = await standing_of(pipes, queue, group)
    except UnknownQueue:
        return False
    return standing is None or standing.registered


class DeletionWatch:
    """`look` once before the group is led, then `run` beside it."""

    def __init__(self, pipes: Pipes, queue: Queue, group: str, outages: Outages, contact: Contact) -> None:
        self._pipes, self._queue, self._group, self._outages = pipes, queue, group, outages
        self._contact = contact
        self._cant_look = f"{queue.name}/{group}: whether it was deleted can't be read"
        self._seen = False
        self._older: tuple[int, str] | None = None  # the note that a shard had when it was looked at first

    async def run(self, pause: Callable[[float], Awaitable[None]]) -> None:
        """Until it is cancelled. Raises what tells of a deletion."""
        while True:
            await pause(LOOK_EVERY_S)
            try:
                await self.look()
                self._outages.well(self._cant_look)
            except (StoreError, CorruptData) as error:
                self._outages.failed(self._cant_look, error)

    async def look(self) -> None:
        """Raises UnknownGroup when the group was deleted since the first look, UnknownQueue when there is no queue any
        more; StoreError, CorruptData."""
        shard = self._queue.table.shards[0].id
        standing = await standing_of(self._pipes, self._queue, self._group)
        if standing is None:
            return  # whoever owns that shard tells of it
        self._judge(shard, standing)

    def _judge(self, shard: int, standing: Standing) -> None:
        if standing.registered:
            self._seen = True
            self._contact.there()
            return
        if self._older is None or self._older[0] != shard:
            self._older = (shard, standing.deleted)  # each shard has a time of its own in it
        deleted = bool(standing.deleted) and (self._seen or self._older != (shard, standing.deleted))
        if deleted or (self._seen and self._contact.is_lost()):
            raise group_gone(self._queue.name, self._group, "coordinator", deleted=deleted)
