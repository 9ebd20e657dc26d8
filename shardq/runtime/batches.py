"""Messages of one shard that go in one call, and who waits for them: encoded, split, followed to where they went. Sends
nothing; which batch a message enters, and when that is packed, is for buffers.py and filling.py.

Invariants:
- Whoever waits for a message is told once: what its batch, or the one that the message was moved to, ended with.
- A batch that has ended keeps no messages.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from shardq.core import records
from shardq.core.compression import Compression
from shardq.core.records import Headers, Key
from shardq.errors import ShardqError
from shardq.runtime.waiting import Waiting
from shardq.storage import appends
from shardq.storage.commands import Packed

if TYPE_CHECKING:
    from shardq.runtime.buffers import Owner, ShardBuffer


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
        "moved",
        "now_ms",
        "opened_monotonic_s",
        "shard",
        "size",
        "starts",
        "stored_as",
        "times",
        "values",
        "waiting",
    )

    def __init__(self, shard: ShardBuffer) -> None:
        self.shard = shard
        self.keys: list[Key] = []
        self.values: list[Any] = []
        self.headers: dict[int, Headers] | None = None
        # From message `starts[i]` on they were sent at `times[i]`. Not in pairs: the garbage collector looks at each.
        self.starts: list[int] = []
        self.times: list[int] = []
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
        # Where each message went, when its shard was sealed: then this batch itself has no end. Of one that only chunks
        # brought where they went together, not each of them.
        self.moved: list[tuple[PendingBatch, int]] | None = None

    def encode(self, compression: Compression | None = None) -> bytes | bytearray:
        count, base = len(self.keys), self.times[0]
        self.count = count
        offsets: list[int] | None = None
        if len(self.times) > 1:
            offsets = []
            for ms, start, end in zip(self.times, self.starts, (*self.starts[1:], count), strict=True):
                offsets += [ms - base] * (end - start)
        headers = [self.headers.get(index) for index in range(count)] if self.headers else None
        batch = records.RecordBatch(base, offsets, self.keys, self.values, headers)
        return records.encode_buffer(batch, compression)

    def pack(self, producer: Owner, sequence: int) -> Packed:
        """The call that stores it."""
        keys = self.shard.keys
        data = self.encode(producer.compression)
        return appends.pack_append(keys, producer.id, sequence, len(self.keys), data, producer.confirm)

    def read(self, reply: Any) -> appends.Appended:
        return appends.read_append(reply)

    def id_of(self, index: int) -> str:
        """The id of one of its messages, once it is stored."""
        return f"{self.stored_as}{index}"

    @property
    def routes(self) -> list[Key]:
        """What decides the shard of each message."""
        return self.keys

    @property
    def only_chunked(self) -> bool:
        """Whether chunks brought all its messages: then nobody waits for one of them, but for all there are."""
        return 0 < self.chunked == len(self.keys)

    def part(self, shard: ShardBuffer, chosen: Sequence[int]) -> PendingBatch:
        """Some of its messages, in order, as a batch of another shard: as old, and of their share of its bytes."""
        part = type(self)(shard)
        part.opened_monotonic_s, part.bulk = self.opened_monotonic_s, self.bulk
        part.size = self.size * len(chosen) // len(self.routes)
        if self.only_chunked:
            part.chunked = len(chosen)
        part.take(self, chosen)
        return part

    def take(self, batch: Any, chosen: Sequence[int]) -> None:
        """Fills this one, a part, from a batch of its kind."""
        self.keys = [batch.keys[index] for index in chosen]
        self.values = [batch.values[index] for index in chosen]
        if batch.headers:
            places = {index: place for place, index in enumerate(chosen)}
            self.headers = {places[index]: own for index, own in batch.headers.items() if index in places}
        place = 0
        for ms, following in zip(batch.times, (*batch.starts[1:], None), strict=True):
            end = len(chosen) if following is None else bisect_left(chosen, following)
            if end > place:
                self.starts.append(place)
                self.times.append(ms)
            place = end

    def absorb(self, later: PendingBatch) -> None:
        """Takes the messages of a part of its shard behind its own; whoever waits for that one follows it here."""
        count, same = len(self.keys), self.times[-1] == later.times[0]
        self.starts += [count + start for start in later.starts[same:]]
        self.times += later.times[same:]
        self.keys += later.keys
        self.values += later.values
        self.chunked += later.chunked
        self.size += later.size
        self.opened_monotonic_s = min(self.opened_monotonic_s, later.opened_monotonic_s)
        later.move([(self, 0)])

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
        """Its messages went to these other batches: whoever waits follows."""
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
        self.items: list[appends.Item] = []
        self._routes: list[Key] = []

    def add(self, item: appends.Item, route: Key, size: int) -> None:
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
        return appends.pack_append_each(self.shard.keys, producer.id, sequence, self.items, producer.confirm)

    def read(self, reply: Any) -> appends.Appended:
        return appends.read_append(reply, each=self.count)

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
