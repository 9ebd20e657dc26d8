"""A declared queue: the one object through which a user sends to it, reads its history, and looks after its groups,
jobs, dead letters and settings. Each subject is a module of its own; here they are only joined with the queue's shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

from shardq.core import records
from shardq.core import reshard as reshards
from shardq.core.compression import check_available
from shardq.core.hashing import key_hash
from shardq.core.history import Record
from shardq.core.jobs import job_place
from shardq.core.queue_settings import QueueSettings, SettingsChange
from shardq.core.records import Headers, Key
from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.core.values import ValueType
from shardq.errors import MessageTooLarge, ReshardUnderWay, UnknownGroup, UnknownQueue, UsageError
from shardq.runtime import reshard as resharding
from shardq.runtime.dead import DeadLetters
from shardq.runtime.declaring import change_settings
from shardq.runtime.delete import delete_message
from shardq.runtime.groups import GroupInfo, Groups, Position, starts_of
from shardq.runtime.history import When, choose, position, read
from shardq.runtime.jobs import Job
from shardq.runtime.outgrown import LAST_ENTRY
from shardq.runtime.producer import Producer
from shardq.runtime.removal import remove_queue
from shardq.runtime.reshard_state import ReshardState, read_state
from shardq.runtime.tail import follow
from shardq.runtime.tasks import task_group
from shardq.runtime.traced import TracedProducer
from shardq.storage import calls, counters
from shardq.storage.calls import missing_shard
from shardq.storage.keys import Keys, ShardKeys, check_name
from shardq.storage.queues import Declared, stored_queue
from shardq.storage.reshard import leaving

if TYPE_CHECKING:
    from shardq.runtime.client import Client

# Well under PRODUCER_IDLE_MS in scripts/common.lua: a retry must find the sequence it repeats.
LONGEST_DELIVERY_S = 1800
FIRST_ENTRY = "0-0"
MAX_MESSAGE_BYTES = 1024 * 1024

Durability = Literal["leader", "replica", "fsync"]

DEFAULT_SETTINGS = QueueSettings()


class Queue:
    """A declared queue: its routing table and the names of its keys. Get one from `Client.queue`."""

    def __init__(
        self,
        client: Client,
        keys: Keys,
        table: RoutingTable,
        settings: QueueSettings = DEFAULT_SETTINGS,
        values: ValueType | None = None,
    ) -> None:
        self.client = client
        self.keys = keys
        self.table = table
        self.values = values
        self._settings = settings
        self.name = keys.queue
        self.shards: dict[int, ShardKeys] = {}
        """Every shard that has keys, also those that are retired; the same object for as long as the queue is open."""
        self._take(table)

    def producer(
        self,
        *,
        durability: Durability | None = None,
        replicas: int | None = None,
        max_batch_messages: int = 1000,
        max_batch_bytes: int = 256 * 1024,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_buffered_bytes: int = 32 * 1024 * 1024,
        delivery_timeout: float = 120.0,
    ) -> Producer:
        """A producer of this queue; enter it with `async with`.

        durability          when a send counts as stored: "leader" (the master has it), "replica" (`replicas` replicas
                            have it too), "fsync" (it is on the master's disk and on those of `replicas` replicas).
                            Default: "replica" where every master has enough replicas, else "leader"
        replicas            how many; default 1, and for "fsync" none where a master has none. Where masters have more,
                            those may be cut off together with their master, and one is promoted that has not got it:
                            as many as every master has rules that out, but then sends wait for each of them. With
                            "fsync", 0 means the master's disk alone, which a failover to a replica passes over
        max_batch_*         bounds of one record batch
        max_message_bytes   a larger message is refused before it is sent (MessageTooLarge)
        max_buffered_bytes  beyond it `send` waits
        delivery_timeout    seconds after which a batch that could not be stored is given up; a try under way then is
                            waited for (5 s, more for a large batch on a slow link)
        """
        for name, value in (
            ("max_batch_messages", max_batch_messages),
            ("max_batch_bytes", max_batch_bytes),
            ("max_message_bytes", max_message_bytes),
            ("max_buffered_bytes", max_buffered_bytes),
            ("delivery_timeout", delivery_timeout),
        ):
            if value <= 0:
                msg = f"{name} must be above 0, not {value}"
                raise UsageError(msg)
        if delivery_timeout > LONGEST_DELIVERY_S:
            msg = (
                f"delivery_timeout is at most {LONGEST_DELIVERY_S} s: a producer's sequence is forgotten after an hour"
            )
            raise UsageError(msg)
        check_available(self._settings.compression)
        confirm = self.client.confirm(durability, replicas)
        kind = Producer if self.client.tracing is None else TracedProducer
        return kind(
            self.client.cluster,
            self.table,
            self.shards,
            confirm if durability is not None else lambda: self.client.confirm(None, replicas),
            max_batch_messages,
            max_batch_bytes,
            max_message_bytes,
            max_buffered_bytes,
            delivery_timeout,
            queue=self.name,
            client_pipes=lambda: self.client.pipes,
            compression=self._settings.compression,
            values=self.values,
            jobs=self._settings.jobs,
            meters=self.client.meters.send(self.name) if self.client.meters is not None else None,
            on_retry=self.client.on_retry,
            tracer=self.client.tracing,
            source=self,
        )

    def _take(self, table: RoutingTable) -> None:
        self.table = table
        self.shards.clear()
        self.shards.update((shard.id, self.keys.of(shard)) for shard in table.by_id.values())

    # -- shards ----------------------------------------------------------------------------------------------

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

    # -- settings --------------------------------------------------------------------------------------------

    @property
    def settings(self) -> QueueSettings:
        """The queue's settings as they were when this process joined it or last changed them."""
        return self._settings

    @property
    def convert(self) -> Callable[[Any], Any] | None:
        """What makes a value of the declared type of what was carried, or raises InvalidValue; None without a type."""
        return self.values.convert if self.values is not None and self.values.kind is not None else None

    async def change(self, **settings: Unpack[SettingsChange]) -> QueueSettings:
        """Changes settings of the queue, those that are named (see `Client.queue`), and returns all of them.

        Bounds hold at once for everybody; `compression` and `jobs` for producers made after their process joined the
        queue again. Safe to repeat; repeat it if it fails half way. Raises UsageError, UnknownQueue.
        """
        known = await change_settings(self.client.pipes, self.keys, settings)
        self._settings = known.settings
        return known.settings

    async def delete(self, *, force: bool = False) -> None:
        """Deletes the queue: its messages, groups, dead letters, schedules, settings. Nothing brings them back.

        What handlers keep on the shards (`message.local_key`) stays. Raises UnknownQueue when it is deleted already,
        and GroupInUse while workers hold shards or are members of a group, before anything was changed; `force` is for
        workers that were killed. Producers that are open get UnknownQueue. If the call fails half way, repeat it.
        """
        await remove_queue(self.client.pipes, self.keys, await self._everything(), force=force)

    async def _everything(self) -> dict[int, ShardKeys]:
        """Every shard that has keys, also those that a reshard made and no table names yet, or any more."""
        try:
            stored = await self._stored()
        except UnknownQueue:  # a deletion that was cut short is completed
            return self.shards
        self._take(RoutingTable.from_bytes(stored.table))
        found = dict(self.shards)
        for shard in await leaving(self.client.pipes, self.keys):
            for relative in self.table.relatives(shard)[:1]:
                found[shard] = self.keys.shard(shard, relative.tag, relative.home_id)
        if stored.reshard:
            plan = Reshard.from_bytes(stored.reshard)
            found |= {shard.id: self.keys.of(shard) for shard in plan.children}
        return found

    # -- groups ----------------------------------------------------------------------------------------------

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
        # A reshard may have passed by: it opens on new shards what was open on the old ones when it looked.
        while await self.refresh():
            created = await self._groups.open(group, start) or created
        await self._open_on_coming(group, start)
        return created

    async def _open_on_coming(self, group: str, start: Position) -> None:
        """Opens the group on shards that a reshard under way makes. Those that are not there yet get it from it."""
        stored = await self._stored()
        if stored.reshard:
            plan = Reshard.from_bytes(stored.reshard)
            await self._on(plan.table).open_coming(group, start, [child.id for child in plan.children])

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
        while await self.refresh():  # a reshard passed by
            with contextlib.suppress(UnknownGroup):
                await self._groups.delete(group, force=force)

    # -- history ---------------------------------------------------------------------------------------------

    def history(
        self,
        start: When = None,
        end: When = None,
        *,
        reverse: bool = False,
        shards: Iterable[int] | None = None,
        key: str | bytes | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Record]:
        """The stored messages from `start` to `end`, both inclusive, read without consuming them:
        `async for record in queue.history(): ...`

        start, end   a message id (exact on its own shard; on the others its ms of storing), an aware datetime, Unix
                     time in seconds, or a timedelta: that long ago by the servers' clocks. None: from the first, to
                     the last stored when it is reached
        reverse      newest first
        shards       only these; key: only this key's messages, read from its shard alone
        limit        so many records at most

        Over all shards the order is by (ms of storing, sequence, shard). Memory does not grow with the queue. What was
        trimmed is not there any more. An entry that can't be read is a record with an `error`. Raises UsageError, and
        StoreError when a page of a shard was not answered within 10 s, and a smaller one in another 10 s.
        """
        if limit is not None and limit < 0:
            msg = f"limit is 0 or more, not {limit}"
            raise UsageError(msg)
        first, last = position(self, "start", start), position(self, "end", end)
        return read(self, choose(self, shards, key), first, last, reverse=reverse, limit=limit)

    async def peek(
        self,
        n: int = 10,
        *,
        start: When = None,
        end: When = None,
        reverse: bool = False,
        shards: Iterable[int] | None = None,
        key: str | bytes | None = None,
    ) -> list[Record]:
        """The oldest `n` messages stored, or with `reverse` the newest `n`, newest first; else like `history`."""
        found = self.history(start, end, reverse=reverse, shards=shards, key=key, limit=n)
        return [record async for record in found]

    def tail(
        self, *, from_end: int = 10, shards: Iterable[int] | None = None, key: str | bytes | None = None
    ) -> AsyncIterator[Record]:
        """The last `from_end` messages, then every message as it is stored, without end and without consuming any.

        Ordered within a shard; over shards by ms of storing as far as they are read together. New messages are looked
        for every 50 ms where some came, and once a second where none do. While a master is away its shards wait, and
        the follower goes on. Raises UsageError, StoreError.
        """
        if from_end < 0:
            msg = f"from_end is 0 or more, not {from_end}"
            raise UsageError(msg)
        return follow(self, choose(self, shards, key), from_end)

    # -- single messages -------------------------------------------------------------------------------------

    def job(self, job_id: str) -> Job:
        """A tracked job of this queue by its id. Raises UsageError for what is no id of this queue."""
        queue, shard = job_place(job_id)
        if queue != self.name:
            msg = f"job {job_id} is not of queue {self.name!r}: ask client.queue({queue!r}) for it"
            raise UsageError(msg)
        relatives = self.table.relatives(shard)
        if not relatives:
            msg = (
                f"job {job_id} is not of queue {self.name!r}, which has no shard {shard}; if it was split since this "
                "process joined it, call `await queue.refresh()` and ask again"
            )
            raise UsageError(msg)
        return Job(lambda: self.client.pipes, self.keys.of(relatives[0]), job_id)  # records are their home's

    async def delete_message(self, message_id: str, *, timeout: float = 30.0) -> bool:  # noqa: ASYNC109
        """Deletes one message for good, by its id (`message.id`, or what `send` returned): no group handles it any
        more, unless its handler runs right now, and its bytes leave Redis, those of its retries and dead letters too.
        The others of its batch stay as they are.

        Returns true when the bytes are gone; false when some group has not finished its batch: then they
        go as soon as all have. Raises UsageError when it is not stored (any more), StoreTimeout when a worker did not
        confirm in `timeout` seconds, StoreError when Redis does not answer for 10 s.
        """
        await self.refresh()
        return await delete_message(self.client.pipes, self.table, self.shards, message_id, timeout)

    async def trim(self, before: Position) -> int:
        """Gives up what is kept of finished messages stored before a position (see `start` of `open_group`); returns
        how many entries went. What some group has not finished stays, whatever `before` says."""
        limits = {"earliest": FIRST_ENTRY, "latest": LAST_ENTRY}
        starts = starts_of(before, self.shards)
        gone: list[int] = []

        async def trim_one(shard: int) -> None:
            entry = limits.get(starts[shard].entry, starts[shard].entry)
            gone.append(await calls.trim(self.client.pipes, self.shards[shard], entry))

        async with task_group() as tasks:
            for shard in self.shards:
                tasks.start_soon(trim_one, shard)
        return sum(gone)

    def dead_letters(self, group: str) -> DeadLetters:
        """The dead letters of a group: to read, replay, purge."""
        return DeadLetters(self.client.pipes, self.shards, group)

    def place_of(self, key: Key) -> ShardKeys:
        """The keys of the shard that messages of this key go to; without a key, of the first shard."""
        return (
            self.shards[self.table.shard_for(key_hash(key)).id] if key is not None else next(iter(self.shards.values()))
        )

    def local_key(self, name: str, key: Key) -> str:
        """The Redis key that `message.local_key(name)` names for messages of this key, to be read from outside."""
        return self.place_of(key).data(name)

    def encode_one(self, key: Key, value: Any, headers: Headers | None, now_ms: int) -> bytes:
        """A record batch of one message, for `tx.send`. Raises InvalidKey, InvalidValue, MessageTooLarge."""
        if self.values is not None:
            self.values.check(value)
        if self.client.tracing is not None:
            headers = self.client.tracing.carry(headers)
        own = [records.check_headers(headers)] if headers else None
        batch = records.RecordBatch(now_ms, None, [key], [records.pack_value(value)], own)
        data = records.encode(batch, self._settings.compression)
        if len(data) > MAX_MESSAGE_BYTES:
            msg = f"a message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}: send a reference instead"
            raise MessageTooLarge(msg)
        return data

    @property
    def _groups(self) -> Groups:
        return self._on(self.table)

    def _on(self, table: RoutingTable) -> Groups:
        return Groups(self.client.pipes, self.keys, table)

    async def counters(self, groups: Sequence[str] | None = None) -> dict[int, counters.ShardCounters]:
        """The counters of every shard, and of the named groups (default: every registered one)."""
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
