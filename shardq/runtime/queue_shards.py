"""A queue's shards: its routing table as this process knows it, read anew when it may be another, and changed by splits
and merges. How a reshard is carried out is in reshard.py; messages and groups are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from shardq.core import reshard as reshards
from shardq.core.queue_settings import QueueSettings
from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.errors import ReshardUnderWay, UnknownQueue
from shardq.runtime import reshard as resharding
from shardq.runtime.reshard_state import ReshardState, read_state
from shardq.storage import counters
from shardq.storage.calls import missing_shard
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.queues import Declared, stored_queue

if TYPE_CHECKING:
    from shardq.runtime.client import Client


class QueueShards:
    """The part of a `Queue` that knows its shards."""

    def __init__(self, client: Client, keys: Keys, table: RoutingTable, settings: QueueSettings) -> None:
        self.client = client
        self.keys = keys
        self.table = table
        self._settings = settings
        self.name = keys.queue
        self.shards: dict[int, ShardKeys] = {}
        """Every shard that has keys, also those that are retired; the same object for as long as the queue is open."""
        self._take(table)

    def _take(self, table: RoutingTable) -> None:
        self.table = table
        self.shards.clear()
        self.shards.update((shard.id, self.keys.of(shard)) for shard in table.by_id.values())

    async def refresh(self) -> bool:
        """Reads the routing table anew; true when it is another one. `queue.shards` changes in place. Raises
        UnknownQueue."""
        return await self._look() is not None

    async def _look(self) -> Declared | None:
        """What is stored, where the routing table is another one than this process knew."""
        stored = await self._stored()
        table = RoutingTable.from_bytes(stored.table)
        if table.version <= self.table.version:  # of two looks side by side the earlier may end last
            return None
        self._take(table)
        return stored

    async def _stored(self) -> Declared:
        stored = await stored_queue(self.client.pipes, self.keys)
        if stored is None:
            msg = f"queue {self.name!r} does not exist (any more)"
            raise UnknownQueue(msg)
        return stored

    async def split(self, shard: int, into: int = 2) -> list[int]:
        """Cuts a shard into `into` equal ranges while the queue is in use; returns the ids of the new shards.

        The new shards stay in the hash slot of the old one: that spreads workers, not Redis. The old one takes no more
        messages; each group finishes it before it begins on the new ones, so messages of a key stay in order. It is
        done when this returns; what the groups have left shows in `reshard`. If the call fails half way, repeat it:
        what was begun is completed, by a leader of a group within a second or two too. Raises UsageError for a shard
        that can't be split, ReshardUnderWay while somebody else changes the shards.
        """
        return await self._change(lambda table: reshards.split(table, shard, into))

    async def split_all(self, into: int = 2) -> list[int]:
        """`split` for every shard, at once."""
        return await self._change(lambda table: reshards.split_all(table, into))

    async def merge(self, shards: Iterable[int]) -> list[int]:
        """Makes one shard of several that splits made of one, and whose ranges touch; else as `split`."""
        chosen = list(shards)
        return await self._change(lambda table: reshards.merge(table, chosen))

    async def scale(self, shards: int) -> list[int]:
        """Brings the queue to so many shards, by splits and merges, as even as can be; none fewer than it was declared
        with. Shards whose range stays are kept; none new where it has that many already. Else as `split`."""
        return await self._change(lambda table: reshards.scale(table, shards))

    async def _change(self, make: Callable[[RoutingTable], Reshard | None]) -> list[int]:
        pipes, stored = self.client.pipes, await self._stored()
        if stored.reshard:
            # A repeated call finds its own plan, or one that nobody carries on any more.
            before = RoutingTable.from_bytes(stored.table)
            await resharding.carry_on(pipes, self.keys)
            await self.refresh()
            plan = make(before)
            if plan is None or plan.to_bytes() != stored.reshard:
                msg = f"another reshard of queue {self.name!r} was under way and is done: look at it, then repeat this"
                raise ReshardUnderWay(msg)
            return [child.id for child in plan.children]
        self._take(RoutingTable.from_bytes(stored.table))
        plan = make(self.table)
        if plan is None:
            await resharding.look_after(pipes, self.keys)  # where no leader may, who repeats this removes old shards
            await self.refresh()
            return []
        await resharding.begin(pipes, self.keys, plan)
        await resharding.carry_on(pipes, self.keys)
        await self.refresh()
        return [child.id for child in plan.children]

    async def reshard(self) -> ReshardState | None:
        """What is left of changes of the number of shards: the one under way, what groups still have to do on old
        shards, why those are still there. None when there is nothing. Raises UnknownQueue, StoreError."""
        return await read_state(self.client.pipes, self.keys, await self._stored())

    async def give_up_reshard(self) -> bool:
        """Gives up a change of shards that was begun and stopped before it sealed any; false when there is none.
        Raises ReshardUnderWay when it is too late for that: then it is carried out."""
        given_up = await resharding.give_up(self.client.pipes, self.keys)
        await self.refresh()
        return given_up

    def most_in_batch(self, wanted: int) -> int:
        """Messages in one batch: `wanted`, unless a batch holds fewer, or the narrowest shard's share of `max_backlog`
        does."""
        narrowest = min(self.table.shards, key=lambda shard: shard.high - shard.low)
        share = self._settings.for_range(narrowest.low, narrowest.high).get("max_backlog")
        return min(wanted, 65535, int(share) if share is not None else 65535)

    async def _counters(self, groups: Sequence[str] | None) -> dict[int, counters.ShardCounters]:
        if groups is None:
            first = await counters.inspect(self.client.pipes, next(iter(self.shards.values())), ())
            groups = first.registered
        shards = sorted(self.shards)
        found = await counters.inspect_all(self.client.pipes, [self.shards[shard] for shard in shards], groups)
        there = {shard: each for shard, each in zip(shards, found, strict=True) if each is not None}
        for shard in shards:
            if shard not in there and shard in self.table.by_id:  # a retired one may be gone by now
                raise UnknownQueue(missing_shard(self.shards[shard]))
        return there

    async def counters(self, groups: Sequence[str] | None = None) -> dict[int, counters.ShardCounters]:
        """The counters of every shard, and of the named groups (default: every registered one). Raises UnknownQueue."""
        while True:
            try:
                return await self._counters(groups)
            except UnknownQueue:  # or this process knew nothing of a reshard, and what that left was removed
                if not await self.refresh():
                    raise
