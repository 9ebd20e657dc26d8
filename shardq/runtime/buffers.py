"""What a producer holds of one shard: messages waiting, and the one append under way. Routes nothing, waits for nobody.

Invariants:
- A batch is frozen when it is first packed: the same sequence, the same bytes, however often it is sent.
- The next batch of a shard is sent only when the one before it is stored or given up, so a shard keeps send order.
- What a sealed shard refused was not stored, and stands before all that is behind it (rerouting.py takes it from here).
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any, Protocol

from shardq.core import records
from shardq.core.backoff import backoff_s
from shardq.core.compression import Compression
from shardq.core.records import Headers, Key
from shardq.errors import QueueFull, ShardqError, StoreRefused, UnknownQueue
from shardq.runtime.waiting import Waiting
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


class PendingBatch:
    """Messages of one shard that will be stored as one entry."""

    __slots__ = (
        "bulk",
        "chunked",
        "count",
        "entries",
        "error",
        "finished",
        "headers",
        "keys",
        "marks",
        "moved",
        "now_ms",
        "opened_monotonic_s",
        "shard",
        "size",
        "stored_as",
        "values",
        "waiting",
    )

    def __init__(self, shard: ShardBuffer) -> None:
        self.shard = shard
        self.keys: list[Key] = []
        self.values: list[Any] = []
        self.headers: dict[int, Headers] | None = None
        self.marks: list[tuple[int, int]] = []
        self.count = 0
        self.chunked = 0  # how many of its messages chunks brought
        self.now_ms = 0
        self.size = 0
        self.opened_monotonic_s = 0.0
        self.waiting: Waiting | None = None
        self.finished = False
        self.stored_as = ""  # once it is stored: what its messages' ids begin with
        self.bulk = False
        self.entries: tuple[str, ...] = ()
        self.error: ShardqError | None = None
        # Where each message went, when its shard was sealed: then this batch itself has no end.
        self.moved: list[tuple[PendingBatch, int]] | None = None

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
        return f"{self.stored_as}{index}"

    @property
    def routes(self) -> list[Key]:
        """What decides the shard of each message."""
        return self.keys

    def part(self, shard: ShardBuffer, chosen: Sequence[int]) -> PendingBatch:
        """Some of its messages, in order, as a batch of another shard: as old, and of their share of its bytes."""
        part = type(self)(shard)
        part.opened_monotonic_s, part.bulk = self.opened_monotonic_s, self.bulk
        part.size = self.size * len(chosen) // len(self.routes)
        part.take(self, chosen)
        return part

    def take(self, batch: Any, chosen: Sequence[int]) -> None:
        """Fills this one, a part, from a batch of its kind."""
        self.keys = [batch.keys[index] for index in chosen]
        self.values = [batch.values[index] for index in chosen]
        if batch.headers:
            places = {index: place for place, index in enumerate(chosen)}
            self.headers = {places[index]: own for index, own in batch.headers.items() if index in places}
        marks, place = batch.marks, 0
        for number, (_, ms) in enumerate(marks):
            end = bisect_left(chosen, marks[number + 1][0]) if number + 1 < len(marks) else len(chosen)
            if end > place:
                self.marks.append((place, ms))
            place = end

    async def wait(self) -> None:
        """Until it is stored or given up."""
        while not self.finished:
            await (self.waiting or self.attend())

    def attend(self) -> Waiting:
        """For the first one that waits."""
        producer = self.shard.producer
        self.waiting = Waiting(producer.loop, producer.woken)
        return self.waiting

    async def follow(self, index: int) -> tuple[PendingBatch, int]:
        """Until one of its messages is stored or given up: the batch where that was, and its place there."""
        batch: PendingBatch = self
        await batch.wait()
        while batch.moved is not None:
            batch, index = batch.moved[index]
            await batch.wait()
        return batch, index

    def end(self, error: ShardqError | None, entries: tuple[str, ...]) -> None:
        """It was stored, or given up: whoever waits goes on."""
        self.error, self.entries = error, entries
        if entries:
            self.stored_as = f"{self.shard.id}/{entries[0]}/"
        self._finish()

    def move(self, places: list[tuple[PendingBatch, int]]) -> None:
        """Its messages went to other batches, each to one of these: whoever waits follows."""
        self.moved = places
        self._finish()

    def _finish(self) -> None:
        self.finished = True
        self.keys, self.values, self.headers = [], [], None
        if self.waiting is not None:
            self.waiting.wake()
            self.waiting = None


class ConditionalBatch(PendingBatch):
    """Messages of one shard that are each stored on a condition of their own: later, once, as a job. An entry each."""

    __slots__ = ("_routes", "items")

    def __init__(self, shard: ShardBuffer) -> None:
        super().__init__(shard)
        self.items: list[calls.Item] = []
        self._routes: list[Key] = []

    def add(self, item: calls.Item, route: Key, size: int) -> None:
        """`route` is its key, or its dedupe id where that decides."""
        self.items.append(item)
        self._routes.append(route)
        self.count += 1
        self.size += size

    @property
    def routes(self) -> list[Key]:
        return self._routes

    def take(self, batch: Any, chosen: Sequence[int]) -> None:
        self.items = [batch.items[index] for index in chosen]
        self._routes = [batch.routes[index] for index in chosen]
        self.count = len(chosen)

    def pack(self, producer: Owner, sequence: int) -> Packed:
        return calls.pack_append_each(self.shard.keys, producer.id, sequence, self.items, producer.confirm)

    def read(self, reply: Any) -> calls.Appended:
        return calls.read_append(reply, each=self.count)

    def _finish(self) -> None:
        super()._finish()
        self.items, self._routes = [], []

    def id_of(self, index: int) -> str:
        entry = self.entries[index]
        # An entry that names its shard: a message of that dedupe id was stored on another one of the home before.
        return f"{entry}/0" if "/" in entry else f"{self.shard.id}/{entry}/0"


async def all_ended(batches: Iterable[PendingBatch]) -> list[PendingBatch]:
    """Waits until the messages of all these are stored or given up; the batches where that was, each once."""
    waited, ended = dict.fromkeys(batches), dict[PendingBatch, None]()
    while waited:
        batch, _ = waited.popitem()
        await batch.wait()
        if batch.moved is None:
            ended[batch] = None
        else:
            waited |= dict.fromkeys(part for part, _ in batch.moved)
    return list(ended)


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
        # What chunks brought and no batch has taken in yet (filling.py): behind all that is in the open one. A batch
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

    def put_behind(self, batch: PendingBatch) -> None:
        """A batch of messages that came from another shard, behind all there are."""
        self.gather()
        if self.open.keys:
            self.roll()
        self.closed.append(batch)

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
        if self.closed or self.open.keys or self.staged:
            self.producer.restart(self)

    def add_conditional(
        self, item: calls.Item, route: Key, size: int, now_s: float, most: int
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
