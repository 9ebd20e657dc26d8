"""What a producer holds of one shard: messages waiting, and the one append under way. Routes nothing, waits for nobody.

Invariants:
- A batch is frozen when it is first packed: the same sequence, the same bytes, however often it is sent.
- The next batch of a shard is sent only when the one before it is stored or given up, so a shard keeps send order.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from time import monotonic
from typing import Any, Protocol

from shardq.core import records
from shardq.core.backoff import backoff_s
from shardq.core.compression import Compression
from shardq.core.records import Headers, Key
from shardq.errors import QueueFull, ShardqError, StoreRefused, UnknownQueue
from shardq.storage import calls
from shardq.storage.cluster import Confirm, Packed
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

FULL_PAUSE_FIRST_S = 0.01
FULL_PAUSE_LAST_S = 0.5


class Owner(Protocol):
    """What a shard's buffer needs of its producer."""

    id: str
    compression: Compression | None
    delivery_timeout_s: float
    loop: asyncio.AbstractEventLoop

    @property
    def confirm(self) -> Confirm | None: ...

    @property
    def pipes(self) -> Pipes: ...

    def full(self, batch: PendingBatch) -> bool: ...

    def restart(self, shard: ShardBuffer) -> None: ...

    def ended(self, batch: PendingBatch, error: ShardqError | None, entries: tuple[str, ...]) -> None: ...


class PendingBatch:
    """Messages of one shard that will be stored as one entry."""

    __slots__ = (
        "bulk",
        "count",
        "entries",
        "error",
        "finished",
        "headers",
        "keys",
        "marks",
        "now_ms",
        "opened_monotonic_s",
        "shard",
        "size",
        "values",
        "waiters",
    )

    def __init__(self, shard: ShardBuffer) -> None:
        self.shard = shard
        self.keys: list[Key] = []
        self.values: list[Any] = []
        self.headers: dict[int, Headers] | None = None
        self.marks: list[tuple[int, int]] = []
        self.count = 0
        self.now_ms = 0
        self.size = 0
        self.opened_monotonic_s = 0.0
        self.waiters: list[asyncio.Future[None]] = []
        self.finished = False
        self.bulk = False
        self.entries: tuple[str, ...] = ()
        self.error: ShardqError | None = None

    def encode(self, compression: Compression | None = None) -> bytes | bytearray:
        count, base = len(self.keys), self.marks[0][1]
        self.count = count
        offsets: list[int] | None = None
        if len(self.marks) > 1:
            ends = [index for index, _ in self.marks[1:]] + [count]
            offsets = []
            for (start, ms), end in zip(self.marks, ends, strict=True):
                offsets += [ms - base] * (end - start)
        headers = [self.headers.get(index) for index in range(count)] if self.headers else None
        batch = records.RecordBatch(base, offsets, self.keys, self.values, headers)
        return records.encode_buffer(batch, compression)

    def pack(self, producer: Owner, sequence: int) -> Packed:
        """The call that stores it."""
        keys = self.shard.keys
        data = self.encode(producer.compression)
        return calls.pack_append(keys, producer.id, sequence, len(self.keys), data, producer.confirm)

    def read(self, reply: Any) -> calls.Appended:
        return calls.read_append(reply)

    def id_of(self, index: int) -> str:
        """The id of one of its messages, once it is stored."""
        return f"{self.shard.id}/{self.entries[0]}/{index}"

    async def wait(self) -> None:
        """Until it is stored or given up."""
        if not self.finished:
            # A bare future each, of a loop that is known: an anyio.Event for all of them costs a send a third more, as
            # does asking for the running loop (a system call, up to Python 3.11).
            waiter = self.shard.producer.loop.create_future()
            self.waiters.append(waiter)
            await waiter

    def end(self, error: ShardqError | None, entries: tuple[str, ...]) -> None:
        """It was stored, or given up: whoever waits goes on."""
        self.error, self.entries, self.finished = error, entries, True
        self.keys, self.values, self.headers = [], [], None
        for waiter in self.waiters:
            if not waiter.done():  # its task may have been cancelled
                waiter.set_result(None)
        self.waiters = []


class ConditionalBatch(PendingBatch):
    """Messages of one shard that are each stored on a condition of their own: later, once, as a job. An entry each."""

    __slots__ = ("items",)

    def __init__(self, shard: ShardBuffer) -> None:
        super().__init__(shard)
        self.items: list[calls.Item] = []

    def pack(self, producer: Owner, sequence: int) -> Packed:
        return calls.pack_append_each(self.shard.keys, producer.id, sequence, self.items, producer.confirm)

    def read(self, reply: Any) -> calls.Appended:
        return calls.read_append(reply, each=self.count)

    def id_of(self, index: int) -> str:
        return f"{self.shard.id}/{self.entries[index]}/0"


class ShardBuffer:
    """One shard's batches; the request that its pipe sends."""

    def __init__(self, producer: Owner, index: int, shard_id: int, keys: ShardKeys) -> None:
        self.producer = producer
        self.index = index
        self.id = shard_id
        self.keys = keys
        self.slot = keys.slot
        self.deadline = 0.0
        self.sequence = 0
        self.busy = False
        self.full_tries = 0
        self.closed: deque[PendingBatch] = deque()
        self.open = PendingBatch(self)
        self.current: PendingBatch | None = None
        self.packed: Packed | None = None

    def roll(self) -> None:
        """Closes the open batch: it is full, or its turn has come."""
        self.closed.append(self.open)
        self.open = PendingBatch(self)

    def close_full(self) -> None:
        if self.producer.full(self.open):
            self.roll()

    def start(self) -> None:
        """Queues the shard in its node's pipe unless it is there."""
        if not self.busy:
            pipes = self.producer.pipes  # raises when the producer is closed: then the shard is not busy
            self.busy = True
            self.deadline = (self.closed[0] if self.closed else self.open).opened_monotonic_s + (
                self.producer.delivery_timeout_s
            )
            pipes.submit(self)

    def pack(self) -> Packed:
        if self.packed is None:
            if not self.closed:
                self.roll()
            batch = self.current = self.closed.popleft()
            self.sequence += 1
            self.packed = batch.pack(self.producer, self.sequence)
        return self.packed

    def settle(self, reply: Any) -> None:
        assert self.current is not None
        try:
            appended = self.current.read(reply)
        except ShardqError as error:
            self._end(error, ())
            return
        if appended.status == "OK":
            self._end(None, appended.entries)
        elif appended.status == "MISSING":
            self._end(UnknownQueue(calls.missing_shard(self.keys)), ())
        elif appended.status == "FULL":
            self._wait_for_room(blocks=appended.overflow != "reject")
        else:
            self._end(
                StoreRefused(f"{self.keys.stream} takes no messages ({appended.status}): open the queue again"), ()
            )

    def _wait_for_room(self, *, blocks: bool) -> None:
        """The shard is full: the same call is made again until there is room, or the delivery timeout is over."""
        pause = backoff_s(self.full_tries + 1, FULL_PAUSE_FIRST_S, FULL_PAUSE_LAST_S, random.random())
        if blocks and monotonic() + pause < self.deadline:
            self.full_tries += 1
            self.producer.pipes.submit_after(self, pause)
            return
        msg = f"{self.keys.stream} is full: its slowest group is max_backlog messages behind; add workers, or raise it"
        self._end(QueueFull(msg), ())

    def fail(self, error: ShardqError) -> None:
        if self.current is None:  # given up before it was ever written: no master owned the slot
            self.pack()
        self._end(error, ())

    def _end(self, error: ShardqError | None, entries: tuple[str, ...]) -> None:
        batch, self.current, self.packed = self.current, None, None
        assert batch is not None
        self.busy, self.full_tries = False, 0
        self.producer.ended(batch, error, entries)
        if self.closed or self.open.keys:
            self.producer.restart(self)

    def add_conditional(self, item: calls.Item, size: int, now_s: float, most: int) -> tuple[ConditionalBatch, bool]:
        """Puts a message with a condition behind all there are; the batch it is in, and whether that is a new one."""
        if self.open.keys:
            self.roll()
        last = self.closed[-1] if self.closed else None
        fresh = not isinstance(last, ConditionalBatch) or len(last.items) >= most
        batch = ConditionalBatch(self) if fresh else last
        assert isinstance(batch, ConditionalBatch)
        if fresh:
            batch.opened_monotonic_s = now_s
            self.closed.append(batch)
        batch.items.append(item)
        batch.count += 1
        batch.size += size
        return batch, fresh
