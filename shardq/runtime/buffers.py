"""What a producer holds of one shard: messages waiting, and the one append under way. Routes nothing, waits for nobody.

Invariants:
- A batch is frozen when it is first packed: the same sequence, the same bytes, however often it is sent.
- The next batch of a shard is sent only when the one before it is stored or given up, so a shard keeps send order.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import anyio

from shardq.core import records
from shardq.core.records import Headers, Key
from shardq.errors import ShardqError, StoreRefused, UnknownQueue
from shardq.storage import calls
from shardq.storage.cluster import Confirm, Packed
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes


class Owner(Protocol):
    """What a shard's buffer needs of its producer."""

    id: str
    confirm: Confirm | None
    delivery_timeout_s: float

    @property
    def pipes(self) -> Pipes: ...

    def full(self, batch: PendingBatch) -> bool: ...

    def restart(self, shard: ShardBuffer) -> None: ...

    def ended(self, batch: PendingBatch, error: ShardqError | None, entry: str) -> None: ...


class PendingBatch:
    """Messages of one shard that will be stored as one entry."""

    __slots__ = (
        "bulk",
        "count",
        "done",
        "entry",
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
        self.done: anyio.Event | None = None
        self.finished = False
        self.bulk = False
        self.entry = ""
        self.error: ShardqError | None = None

    def encode(self) -> bytes:
        count, base = len(self.keys), self.marks[0][1]
        self.count = count
        offsets: list[int] | None = None
        if len(self.marks) > 1:
            ends = [index for index, _ in self.marks[1:]] + [count]
            offsets = []
            for (start, ms), end in zip(self.marks, ends, strict=True):
                offsets += [ms - base] * (end - start)
        headers = [self.headers.get(index) for index in range(count)] if self.headers else None
        return records.encode(records.RecordBatch(base, offsets, self.keys, self.values, headers))

    async def wait(self) -> None:
        if not self.finished:
            if self.done is None:
                self.done = anyio.Event()
            await self.done.wait()


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
            self.packed = calls.pack_append(
                self.keys, self.producer.id, self.sequence, len(batch.keys), batch.encode(), self.producer.confirm
            )
        return self.packed

    def settle(self, reply: Any) -> None:
        try:
            appended = calls.read_append(reply)
        except ShardqError as error:
            self._end(error, "")
            return
        if appended.status == "OK":
            self._end(None, appended.entry)
        elif appended.status == "MISSING":
            self._end(UnknownQueue(calls.missing_shard(self.keys)), "")
        else:
            self._end(
                StoreRefused(f"{self.keys.stream} takes no messages ({appended.status}): open the queue again"), ""
            )

    def fail(self, error: ShardqError) -> None:
        if self.current is None:  # given up before it was ever written: no master owned the slot
            self.pack()
        self._end(error, "")

    def _end(self, error: ShardqError | None, entry: str) -> None:
        batch, self.current, self.packed = self.current, None, None
        assert batch is not None
        self.busy = False
        self.producer.ended(batch, error, entry)
        if self.closed or self.open.keys:
            self.producer.restart(self)
