"""How a coordinator of its own learns that its group, or its queue, was deleted. It claims no shard and so misses none:
it looks now and then at one. Deletes nothing and opens nothing.

A deletion leaves a note on every shard that had the group (`gone:`, scripts/group.lua). A group that was never there is
waited for, and so is one that was deleted before this coordinator came: a worker will open it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shardq.errors import CorruptData, StoreError
from shardq.runtime.contact import Contact, group_gone
from shardq.runtime.outages import Outages
from shardq.runtime.queue import Queue
from shardq.storage.groups import Standing, group_standing
from shardq.storage.pipes import Pipes
from shardq.storage.queues import read_changes

LOOK_EVERY_S = 2.0


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
        await read_changes(self._pipes, self._queue.keys)
        shard = self._queue.table.shards[0].id
        standing = await group_standing(self._pipes, self._queue.shards[shard], self._group)
        if standing is None:
            return  # a master lost what it had: whoever owns a shard there tells of that
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
            again = "start it again if it shall lead a new group of that name"
            raise group_gone(self._queue.name, self._group, "coordinator", deleted=deleted, again=again)
