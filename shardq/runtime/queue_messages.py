"""A queue's messages as they are stored: read without consuming them, followed, trimmed, deleted, asked for as jobs.
Joins what history.py, tail.py, delete.py and jobs.py do with the queue's shards; sends and handles none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from shardq.core.history import Record
from shardq.core.jobs import job_place
from shardq.errors import UsageError
from shardq.runtime.delete import delete_message
from shardq.runtime.groups import Position, starts_of
from shardq.runtime.history import When, choose, position, read
from shardq.runtime.jobs import Job
from shardq.runtime.outgrown import LAST_ENTRY
from shardq.runtime.queue_shards import QueueShards
from shardq.runtime.tail import follow
from shardq.runtime.tasks import task_group
from shardq.storage import calls

FIRST_ENTRY = "0-0"


class QueueMessages(QueueShards):
    """The part of a `Queue` that reads what is stored, and removes some of it."""

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
