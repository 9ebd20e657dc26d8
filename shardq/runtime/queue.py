"""A declared queue: the one object through which a user sends to it, reads its history, and looks after its groups,
jobs, dead letters and settings. Shards, groups and stored messages have modules of their own (queue_shards.py,
queue_groups.py, queue_messages.py); here are producers, settings, and the queue as a whole. Sends nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Unpack

from shardq.core import records
from shardq.core.compression import check_available
from shardq.core.hashing import key_hash
from shardq.core.queue_settings import QueueSettings, SettingsChange
from shardq.core.records import Headers, Key
from shardq.core.reshard import Reshard
from shardq.core.routing import RoutingTable
from shardq.core.values import ValueType
from shardq.errors import MessageTooLarge, UnknownQueue, UsageError
from shardq.runtime.declaring import change_settings
from shardq.runtime.producer import Producer
from shardq.runtime.queue_groups import QueueGroups
from shardq.runtime.queue_messages import QueueMessages
from shardq.runtime.removal import remove_queue
from shardq.runtime.traced import TracedProducer
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.reshard import leaving

if TYPE_CHECKING:
    from shardq.runtime.client import Client

# Well under PRODUCER_IDLE_MS in scripts/common.lua: a retry must find the sequence it repeats.
LONGEST_DELIVERY_S = 1800
MAX_MESSAGE_BYTES = 1024 * 1024

Durability = Literal["leader", "replica", "fsync"]

DEFAULT_SETTINGS = QueueSettings()


class Queue(QueueGroups, QueueMessages):
    """A declared queue: its routing table and the names of its keys. Get one from `Client.queue`."""

    def __init__(
        self,
        client: Client,
        keys: Keys,
        table: RoutingTable,
        settings: QueueSettings = DEFAULT_SETTINGS,
        values: ValueType | None = None,
    ) -> None:
        super().__init__(client, keys, table, settings)
        self.values = values

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

    # -- settings, and the queue as a whole ------------------------------------------------------------------

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

    # -- where a key goes ------------------------------------------------------------------------------------

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
