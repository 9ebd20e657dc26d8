"""A queue's consumer groups: opened, listed, put elsewhere, paused, deleted, and their dead letters. Joins what
groups.py and dead.py do with the queue's shards, those that a reshard makes among them; handles no message.
"""

from __future__ import annotations

import contextlib

from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.errors import UnknownGroup
from shardq.runtime.dead import DeadLetters
from shardq.runtime.groups import GroupInfo, Groups, Position
from shardq.runtime.queue_shards import QueueShards
from shardq.storage.keys import check_name
from shardq.storage.queues import Declared


class QueueGroups(QueueShards):
    """The part of a `Queue` that looks after its groups."""

    async def open_group(self, group: str, start: Position = "earliest") -> bool:
        """Registers a consumer group on every shard; false when it was there. Safe to repeat.

        start   where a new group begins (a group that exists stays where it is, whatever `start` says):
                "earliest": the first message that is stored
                "latest": the messages appended from now on
                an aware datetime, or Unix seconds: the first entry stored at or after it, by its shard's clock; the end
                of the queue for a time to come
                a message id (`message.id`, or what `send` returned): that message on its shard; on the others what was
                stored from that entry's millisecond on
        """
        check_name("group", group)
        created = await self._groups.open(group, start)
        while (stored := await self._unchanged()) is None:
            created = await self._groups.open(group, start) or created
        if coming := self._coming(stored):
            await self._on(coming.table).open_coming(group, start, [child.id for child in coming.children])
        return created

    async def _unchanged(self) -> Declared | None:
        """What is stored, in one look, when the shards are those that were just gone through. None when they are not: a
        reshard passed by, which opens on new shards what was open on the old ones when it looked."""
        stored = await self._stored()
        table = RoutingTable.from_bytes(stored.table)
        if table.version <= self.table.version:
            return stored
        self._take(table)
        return None

    @staticmethod
    def _coming(stored: Declared) -> Reshard | None:
        """The reshard under way, whose new shards may be there; those that are not get from it what the old ones
        have."""
        return Reshard.from_bytes(stored.reshard) if stored.reshard else None

    async def groups(self) -> list[GroupInfo]:
        """Every consumer group of the queue with its backlog, dead letters, leases and workers."""
        return await self._groups.list_all()

    async def reset_group(self, group: str, to: Position, *, force: bool = False) -> int:
        """Puts a group at another position (see `start` of `open_group`), back or forth; returns how many messages
        there are from there on. It goes back as far as messages are stored: a queue that does not retain finished
        messages keeps only those that some group has not finished.

        Messages that were in hand, waited for a retry or were held back by one are given up in favour of the new
        position; dead letters stay. Raises UnknownGroup, and GroupInUse while workers hold any of its shards, before
        anything was changed. `force` takes the leases away: the workers are told, take them anew and go on from the new
        position; what they were handling then is handled again where it lies behind that. Each shard is put there
        atomically, one by one; if the call fails half way, repeat it.
        """
        await self.refresh()
        return await self._groups.reset(check_name("group", group), to, force=force)

    async def pause_group(self, group: str) -> None:
        """Has the group's workers finish what they are at, give their shards back and take none until `resume_group`.

        They stay members. What is sent meanwhile waits; retries and timeouts that come due wait too. A handler that
        runs longer than the worker's `drain_limit` is cancelled, and its message handled again after the pause. Safe to
        repeat. Raises UnknownGroup.
        """
        await self._groups.pause(group, paused=True)

    async def resume_group(self, group: str) -> None:
        """Ends a pause; the workers take their shards again within a second or two. Raises UnknownGroup."""
        await self._groups.pause(group, paused=False)

    async def delete_group(self, group: str, *, force: bool = False) -> None:
        """Deletes a group with its position, retries, dead letters, leases and members. Messages stay for the others.

        Raises UnknownGroup when there is no such group, and GroupInUse while workers hold any of its shards or are its
        members, before anything was changed; `force` is for workers that were killed: those that run end with
        UnknownGroup. If the call fails half way, repeat it.
        """
        check_name("group", group)
        await self.refresh()
        await self._groups.delete(group, force=force)
        while (stored := await self._unchanged()) is None:
            with contextlib.suppress(UnknownGroup):
                await self._groups.delete(group, force=force)
        # After the old ones: who carries the reshard out opens what these have, and then looks whether they still do.
        if coming := self._coming(stored):
            await self._on(coming.table).delete_coming(group, [child.id for child in coming.children], force=force)

    def dead_letters(self, group: str) -> DeadLetters:
        """The dead letters of a group: to read, replay, purge."""
        return DeadLetters(self.client.pipes, self.shards, group)

    @property
    def _groups(self) -> Groups:
        return self._on(self.table)

    def _on(self, table: RoutingTable) -> Groups:
        return Groups(self.client.pipes, self.keys, table)
