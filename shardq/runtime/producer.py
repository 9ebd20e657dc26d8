"""The producer: messages in, record batches out, each stored once. What becomes of the batches is seen to in
settling.py. Knows nothing of workers.

How it goes: every shard has a list of open batches and at most one call in flight. A message is encoded into its
shard's last batch; a shard with something to send waits in the pipe of its node (storage/pipes.py); what gathers while
its call is under way is the next batch. No task, future, lock or call per message. What a sealed shard refuses goes
to the shards that took its keys over (rerouting.py).

Invariant: a send that returned is stored; one that raised says whether the outcome is unknown.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

import anyio
import anyio.lowlevel

from shardq.core import records
from shardq.core.compression import Compression
from shardq.core.conditions import JOB_KEEP_S, Condition, condition, seconds
from shardq.core.jobs import QUEUED, JobState, encode_state, job_headers
from shardq.core.meters import SendMeters
from shardq.core.records import Headers, Key
from shardq.core.routing import RoutingTable
from shardq.core.values import ValueType
from shardq.errors import (
    UsageError,
)
from shardq.runtime.batches import PendingBatch
from shardq.runtime.filling import MESSAGE_OVERHEAD_BYTES, Limits
from shardq.runtime.jobs import Job, new_job_id
from shardq.runtime.rerouting import Source
from shardq.runtime.settling import Settling
from shardq.runtime.staging import CHUNK
from shardq.runtime.tracing import Tracer
from shardq.storage import appends
from shardq.storage.cluster import Cluster
from shardq.storage.commands import Confirm
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

CONDITIONAL_MESSAGES = 200


class Producer(Settling):
    """Sends to one queue. Get one from `Queue.producer()` and enter it with `async with`."""

    def __init__(
        self,
        cluster: Cluster,
        table: RoutingTable,
        shards: Mapping[int, ShardKeys],
        confirm: Confirm | Callable[[], Confirm | None] | None,
        max_batch_messages: int,
        max_batch_bytes: int,
        max_message_bytes: int,
        max_buffered_bytes: int,
        delivery_timeout_s: float,
        *,
        queue: str,
        client_pipes: Callable[[], Pipes],
        compression: Compression | None = None,
        values: ValueType | None = None,
        jobs: bool = False,
        meters: SendMeters | None = None,
        on_retry: Callable[[str], None] | None = None,
        tracer: Tracer | None = None,
        source: Source | None = None,
    ) -> None:
        super().__init__(
            secrets.token_hex(8),
            cluster,
            table,
            shards,
            confirm,
            Limits(max_batch_messages, max_batch_bytes, max_message_bytes),
            max_buffered_bytes,
            delivery_timeout_s,
            compression,
            meters,
            on_retry,
            source,
        )
        self._values = values
        self._job_ms = int(JOB_KEEP_S * 1000) if jobs else 0
        self._queue_name, self._client_pipes = queue, client_pipes
        self._tracer = tracer  # for traced.py, which sets the spans around the calls of this class

    async def send(
        self,
        value: Any,
        *,
        key: Key = None,
        headers: Headers | None = None,
        delay: float | timedelta | None = None,
        at: float | datetime | None = None,
        dedupe_id: str | None = None,
        dedupe_window: float | timedelta | None = None,
    ) -> str:
        """Sends one message and returns its id when it is stored.

        delay, at       handled not before so many seconds from now, or that time (Unix seconds or an aware datetime),
                        by the clock of the shard's server. The message takes its place among those of its key when it
                        is due; the id returned, `<shard>/d<n>/0`, is its name until then
        dedupe_id       a second message with this id and key is not stored: the first one's id is returned. Without a
                        key the id decides the shard
        dedupe_window   seconds the id is remembered (600)

        Where the queue was joined with a type and a key (see Client.queue), the value must be of that type, and the key
        is taken from it unless one is given.

        Raises InvalidKey, InvalidValue, MessageTooLarge, UsageError (nothing was sent) or a StoreError; where that has
        `outcome_unknown`, the message may be stored. QueueFull is raised at once with overflow="reject", else when
        there was no room before the delivery timeout. A send that is cancelled may be stored too.

        Waits for room in the producer's buffer no longer than `delivery_timeout`, and once it has room is stored or
        given up within that time and one try (about 5 s, more for a large batch on a slow link).
        """
        if self._values is not None:
            key = self._checked_key(key, value)
        if delay is None and at is None and dedupe_id is None and dedupe_window is None and not self._job_ms:
            # Everything that waits stands here: a coroutine less a message is worth having.
            if self._pipes is None or self._filler.buffered_bytes > self._max_buffered_bytes:
                await self._wait_for_space(self.delivery_timeout_s)
            if headers is None:
                batch, index = self._filler.put_one(key, value)
            else:
                batch, index = self._put(key, value, headers)
            while not batch.finished:
                await (batch.waiting or batch.attend())
            if batch.stored_as:
                return f"{batch.stored_as}{index}"
            batch, index = await batch.follow(index)
            return self._id_of(batch, index)
        wanted = condition(delay, at, dedupe_id, dedupe_window)
        batch, index, _ = await self._put_conditional(key, value, headers, wanted, self._job_ms)
        batch, index = await batch.follow(index)
        return self._id_of(batch, index)

    async def submit(
        self,
        value: Any,
        *,
        key: Key = None,
        headers: Headers | None = None,
        delay: float | timedelta | None = None,
        at: float | datetime | None = None,
        keep: float | timedelta = JOB_KEEP_S,
    ) -> Job:
        """Sends one message as a tracked job: its state and what its handler returns can be asked for, until `keep`
        seconds after the last change. Else like `send`."""
        if self._values is not None:
            key = self._checked_key(key, value)
        wanted, keep_ms = condition(delay, at, None, None), max(1, int(seconds("keep", keep) * 1000))
        batch, index, job_id = await self._put_conditional(key, value, headers, wanted, keep_ms)
        job = Job(self._client_pipes, batch.shard.keys, job_id)
        batch, index = await batch.follow(index)
        job.message_id = self._id_of(batch, index)
        return job

    def _id_of(self, batch: PendingBatch, index: int) -> str:
        """The id of a message whose batch has ended; raises what it ended with."""
        if batch.error is not None:
            if not batch.bulk:
                self._unreported.pop(batch, None)
            raise batch.error
        return batch.id_of(index)

    async def send_many(self, messages: Iterable[Any] | AsyncIterable[Any]) -> int:
        """Sends messages, in order per key, and returns their number when all are stored.

        `messages` gives (key, value) pairs; where the queue was joined with a key (see Client.queue), it gives values.
        Memory stays within `max_buffered_bytes` however many there are. With more than 16 shards a message may
        wait up to a second for others of its shard, while more are taken from a plain iterable.

        A plain iterable runs in the event loop's thread, hundreds of messages or more at a time: while it waits (for a
        file, a query, a socket) nothing else of the program does anything, workers' leases are not renewed either.
        Where taking the next one may wait, give an async iterable.

        When a batch fails no more are taken and NotStored says how many are not (known to be) stored. A message that
        can't be sent raises as in `send`, once all before it are stored; a note on the error says how many those are.
        Each batch is stored or given up within `delivery_timeout` and one try, so an outage ends the call no later than
        that.
        """
        failures: list[PendingBatch] = []
        self._bulk_failures.append(failures)
        try:
            sent = await self._send_all(messages)
            await self.flush()
            self._raise_lost(failures)
            return sent
        finally:
            self._bulk_failures = [other for other in self._bulk_failures if other is not failures]

    async def _send_all(self, messages: Iterable[Any] | AsyncIterable[Any]) -> int:
        sent, failed, values = 0, self._failed_batches, self._values
        _ = self.pipes  # raises ClosedError; nothing is to be taken that nobody would send
        try:
            if isinstance(messages, AsyncIterable):
                async for item in messages:
                    key, value = item if values is None else values.pair(item)
                    if self._pipes is None or self._filler.buffered_bytes > self._max_buffered_bytes:
                        await self._wait_for_space(self.delivery_timeout_s)
                    batch, _ = self._filler.put_one(key, value)
                    batch.bulk = True
                    sent += 1
                    if sent % CHUNK == 0:
                        await anyio.lowlevel.checkpoint()  # an iterable that never waits must not starve the senders
                    if self._failed_batches != failed:
                        break
            else:
                source, more = iter(messages) if values is None else map(values.pair, messages), True
                with self._filler.holding.on():
                    while more and self._failed_batches == failed:
                        before = self._filler.put_messages
                        try:
                            more = self._filler.put_chunk(source)
                        finally:
                            sent += self._filler.put_messages - before
                        await anyio.lowlevel.checkpoint()
                        await self._wait_before_chunk()
        except UsageError as error:
            error.add_note(f"{sent} messages before it were sent")
            await self.flush()
            raise
        return sent

    # -- filling batches -------------------------------------------------------------------------------------

    def _checked_key(self, key: Key, value: Any) -> Key:
        """The key given, or the value's own. Raises InvalidValue for a value of another type, InvalidKey."""
        assert self._values is not None
        self._values.check(value)
        return self._values.key_of(value) if key is None else key

    def _put(self, key: Key, value: Any, headers: Headers | None) -> tuple[PendingBatch, int]:
        if headers is None:
            return self._filler.put_one(key, value)
        packed = records.pack_value(value)
        size = records.value_bytes(packed) + (len(key) if key is not None else 0)
        size += sum(len(name) + len(text) for name, text in records.check_headers(headers).items())
        shard = self._filler.shard_of(key)
        self._filler.check_size(size)
        batch, index = self._filler.put(shard, key, packed, size, time.time_ns() // 1_000_000)
        if headers:
            batch.headers = batch.headers or {}
            batch.headers[index] = dict(headers)
        shard.close_full()
        shard.start()
        return batch, index

    async def _put_conditional(
        self, key: Key, value: Any, headers: Headers | None, wanted: Condition, job_ms: int = 0
    ) -> tuple[PendingBatch, int, str]:
        """Like `_put`, in a batch of messages that are each stored on a condition; with `job_ms` also as a job."""
        await self._wait_for_space(self.delivery_timeout_s)
        route = wanted.once if key is None and wanted.once else key
        shard = self._filler.shard_of(route)
        packed = records.pack_value(value)
        own = dict(records.check_headers(headers)) if headers else None
        now_ms, job, state = time.time_ns() // 1_000_000, "", b""
        if job_ms:
            job = new_job_id(self._queue_name, shard.id)
            own = dict(job_headers(own, job, job_ms))
            state = encode_state(JobState(job, QUEUED, self._queue_name, "", 0, now_ms, now_ms))
        alone = records.RecordBatch(now_ms, None, [key], [packed], [own] if own else None)
        data = records.encode(alone)
        self._filler.check_size(len(data))
        if self.compression is not None:
            data = records.encode(alone, self.compression)
        item = appends.Item(data, wanted.when, wanted.once, wanted.window_ms, job, job_ms, state)
        size = len(data) + len(state) + MESSAGE_OVERHEAD_BYTES
        batch, fresh = shard.add_conditional(item, route, size, monotonic(), CONDITIONAL_MESSAGES)
        if fresh:
            self._filler.unsettled.add(batch)
        self._filler.buffered_bytes += size
        shard.start()
        return batch, batch.count - 1, job
