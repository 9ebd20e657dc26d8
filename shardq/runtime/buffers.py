"""What a producer holds of one shard: messages waiting, and the one append under way. Routes nothing, waits for nobody.

Invariants:
- A batch is frozen when it is first packed: the same sequence, the same bytes, however often it is sent.
- The next batch of a shard is sent only when the one before it is stored or given up, so a shard keeps send order.
- What a sealed shard refused was not stored, and stands before all that is behind it (rerouting.py takes it from here).
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from time import monotonic
from typing import Any, Protocol

from shardq.core.backoff import backoff_s
from shardq.core.compression import Compression
from shardq.core.records import Key
from shardq.errors import QueueFull, ShardqError, StoreRefused, StoreUnavailable, UnknownQueue
from shardq.runtime.batches import ConditionalBatch, PendingBatch
from shardq.storage import appends, calls
from shardq.storage.commands import Confirm, Packed
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

FULL_PAUSE_FIRST_S = 0.01
FULL_PAUSE_LAST_S = 0.5
FULL_TRY_S = 1.0  # so long at least an answer is waited for: one that comes too late leaves open what became of it


class Owner(Protocol):
    """What a shard's buffer needs of its producer."""

    id: str
    compression: Compression | None
    delivery_timeout_s: float
    loop: asyncio.AbstractEventLoop
    woken: asyncio.Future[None]

    @property
    def confirm(self) -> Confirm | None: ...

    @property
    def pipes(self) -> Pipes: ...

    def full(self, batch: PendingBatch) -> bool: ...

    def gather(self, shard: ShardBuffer) -> None: ...

    def restart(self, shard: ShardBuffer) -> None: ...

    def refused(self, shard: ShardBuffer, error: ShardqError | None) -> None: ...

    def ended(self, batch: PendingBatch, error: ShardqError | None, entries: tuple[str, ...]) -> None: ...


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
        self.held = False  # whether it waits for its turn (holding.py)
        self.full_tries = 0
        self.closed: deque[PendingBatch] = deque()
        self.open = PendingBatch(self)
        # What chunks brought and no batch has taken in yet (staging.py): behind all that is in the open one. A batch
        # takes it when it is packed, once for many chunks.
        self.staged_keys: list[Key] = []
        self.staged_values: list[Any] = []
        self.staged_sizes: list[int] = []
        self.staged = False
        self.staged_from = 0
        self.staged_since_monotonic_s = 0.0
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
            oldest = self.closed[0] if self.closed else self.open
            opened = oldest.opened_monotonic_s if oldest.routes or not self.staged else self.staged_since_monotonic_s
            self.deadline = opened + self.producer.delivery_timeout_s
            pipes.submit(self)

    def gather(self) -> None:
        """Takes what is staged into batches."""
        if self.staged:
            self.producer.gather(self)

    def pack(self) -> Packed:
        if self.packed is None:
            if self.staged:
                self.producer.gather(self)
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
            self._refused(UnknownQueue(calls.missing_shard(self.keys)))
        elif appended.status == "SEALED":
            self._refused(None)
        elif appended.status == "FULL":
            self._wait_for_room(blocks=appended.overflow != "reject")
        else:
            self._end(
                StoreRefused(f"{self.keys.stream} takes no messages ({appended.status}): open the queue again"), ()
            )

    def _refused(self, error: ShardqError | None) -> None:
        """Nothing of it was stored, nor will be: the producer looks for who took the keys over. Until then the shard
        counts as busy. `error` is what to raise when nobody did."""
        batch, self.current, self.packed = self.current, None, None
        assert batch is not None
        self.closed.appendleft(batch)
        self.full_tries = 0
        self.producer.refused(self, error)

    def give_up(self, error: ShardqError) -> None:
        """Ends the first batch that was refused, or waits behind one that was; those behind it are tried again."""
        self.current = self.closed.popleft()
        self.current.count = self.current.count or len(self.current.keys)
        self._end(error, ())

    def give_up_late(self, opened_before_s: float, error: ShardqError) -> bool:
        """Ends the batches of a refused shard that were opened before this; whether there are others."""
        self.gather()
        if not self.closed and self.open.keys:
            self.roll()
        while self.closed and self.closed[0].opened_monotonic_s <= opened_before_s:
            batch = self.closed.popleft()
            batch.count = batch.count or len(batch.keys)
            self.producer.ended(batch, error, ())
            if not self.closed and self.open.keys:
                self.roll()
        self.busy = bool(self.closed)
        return self.busy

    @property
    def holds(self) -> bool:
        return bool(self.closed or self.open.keys or self.staged)

    @property
    def messages(self) -> int:
        """How many it holds, but for those of the call under way."""
        return sum(len(batch.routes) for batch in (*self.closed, self.open)) + len(self.staged_keys)

    @property
    def patient(self) -> bool:
        """Whether all it holds may wait for more."""
        return not self.closed and self.open.chunked == len(self.open.keys)

    @property
    def oldest(self) -> PendingBatch:
        """Of the batches that wait."""
        return self.closed[0] if self.closed else self.open

    def take_all(self) -> list[PendingBatch]:
        """All that is not stored, in order; it holds nothing then."""
        self.gather()
        if self.open.keys:
            self.roll()
        taken = list(self.closed)
        self.closed.clear()
        return taken

    @property
    def last_closed(self) -> PendingBatch | None:
        """The closed batch that nothing is behind."""
        return self.closed[-1] if self.closed and not (self.open.keys or self.staged) else None

    def put_behind(self, batch: PendingBatch) -> None:
        """A batch of messages that came from another shard, behind all there are."""
        self.gather()
        if self.open.keys:
            self.roll()
        self.closed.append(batch)

    def _wait_for_room(self, *, blocks: bool) -> None:
        """The shard is full: the same call is made again until there is room, or the delivery timeout is over."""
        assert self.current is not None
        pause = backoff_s(self.full_tries + 1, FULL_PAUSE_FIRST_S, FULL_PAUSE_LAST_S, random.random())
        again_s = monotonic() + pause
        if blocks and again_s < self.current.opened_monotonic_s + self.producer.delivery_timeout_s:
            self.full_tries += 1
            self.deadline = max(self.deadline, again_s + FULL_TRY_S)
            self.producer.pipes.submit_after(self, pause)
            return
        self._end(self._full(), ())

    def _full(self) -> QueueFull:
        what = "its slowest group is max_backlog messages behind; add workers, or raise it"
        return QueueFull(f"{self.keys.stream} is full: {what}")

    def fail(self, error: ShardqError) -> None:
        if self.current is None:  # given up before it was ever written: no master owned the slot
            self.pack()
        if self.full_tries and isinstance(error, StoreUnavailable):
            full = self._full()  # why it waited until now; that the last try was not sent any more says less
            full.__cause__ = error
            error = full
        self._end(error, ())

    def _end(self, error: ShardqError | None, entries: tuple[str, ...]) -> None:
        batch, self.current, self.packed = self.current, None, None
        assert batch is not None
        self.busy, self.full_tries = False, 0
        self.producer.ended(batch, error, entries)
        if self.closed or self.open.keys or self.staged:
            self.producer.restart(self)

    def add_conditional(
        self, item: appends.Item, route: Key, size: int, now_s: float, most: int
    ) -> tuple[ConditionalBatch, bool]:
        """Puts a message with a condition behind all there are; the batch it is in, and whether that is a new one."""
        self.gather()
        if self.open.keys:
            self.roll()
        last = self.closed[-1] if self.closed else None
        fresh = not isinstance(last, ConditionalBatch) or len(last.items) >= most
        batch = ConditionalBatch(self) if fresh else last
        assert isinstance(batch, ConditionalBatch)
        if fresh:
            batch.opened_monotonic_s = now_s
            self.closed.append(batch)
        batch.add(item, route, size)
        return batch, fresh
