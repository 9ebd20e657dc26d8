"""What a producer does when a shard was sealed: finds who took its keys over, and takes what was not stored there.

A range of keys leaves the old shard's buffer only when that shard has refused a batch: until then what was sent before
may still be stored there, and what comes after must not overtake it. Until the newer table is published, messages of
the range gather in the old buffer. Then, in one go, everything in it moves to the buffers of the newest table's shards,
and the range is theirs; shards that hold much go one after another, each in one go. Other shards of the same reshard
keep their buffers until they refuse.

A producer only waits for a plan that somebody else carries out: it has no right to more than its own shards.

Invariants: messages of one key keep their order over the move. A message keeps its send time, and is given up no later
than it would have been. Nothing that a shard refused was stored there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, Protocol

import anyio
import anyio.lowlevel

from shardq.core.backoff import backoff_s
from shardq.core.routing import RoutingTable
from shardq.core.slots import HASH_SPACE
from shardq.errors import ShardqError, StoreError, StoreUnavailable
from shardq.runtime.batches import PendingBatch
from shardq.runtime.buffers import Owner, ShardBuffer
from shardq.runtime.filling import Limits
from shardq.runtime.holding import LONGEST_S
from shardq.runtime.routes import Segment
from shardq.runtime.staging import Filler
from shardq.storage.keys import Keys

# Between the seal and the table a reshard makes a few round trips.
PAUSE_FIRST_S = 0.002
PAUSE_LAST_S = 0.2
# About 10 ms. One shard may have more; but not all of many shards, one after another, before anything else is done.
HANDED_OVER_AT_ONCE = 20_000


class Source(Protocol):
    """The queue that the messages are for: `Queue`."""

    @property
    def keys(self) -> Keys: ...

    @property
    def table(self) -> RoutingTable:
        """The newest routing table that this process knows."""

    async def refresh(self) -> bool:
        """Reads the routing table anew."""

    def most_in_batch(self, wanted: int) -> int:
        """How many messages a batch may have, by that table."""


class Rerouting:
    """The shards of one producer that have refused, until others have their messages. `spawn` starts a task."""

    def __init__(
        self, owner: Owner, filler: Filler, source: Source, most_messages: int, spawn: Callable[..., object]
    ) -> None:
        self._owner, self._filler, self._source, self._table = owner, filler, source, source.table
        self._most_messages, self._spawn = most_messages, spawn
        self._waiting: dict[ShardBuffer, ShardqError | None] = {}
        self._running = False

    def refused(self, shard: ShardBuffer, error: ShardqError | None) -> None:
        """A shard stored nothing of its first batch. `error` is what that ends with when nobody took its keys over;
        None where it was sealed, and somebody will have."""
        self._waiting[shard] = error
        if not self._running:
            self._running = True
            # A task, also where the newer table is known: those that refused with the same reply go together.
            self._spawn(self._run)

    async def _run(self) -> None:
        tries = 0
        await self._reroute()
        while self._waiting:
            trouble: ShardqError | None = StoreUnavailable("its routing table was not read")
            with anyio.move_on_after(max(self._left_s(), 0)):
                trouble = await self._read()
            await self._reroute()
            for shard, error in list(self._waiting.items()):
                self._settle(shard, error, trouble)
            if self._waiting:
                tries += 1
                pause = backoff_s(tries, PAUSE_FIRST_S, PAUSE_LAST_S, random.random())
                await anyio.sleep(max(min(pause, self._left_s()), 0))
        self._running = False

    async def _read(self) -> ShardqError | None:
        """Reads the table; why that failed."""
        try:
            await self._source.refresh()
        except ShardqError as error:
            return error
        return None

    def _left_s(self) -> float:
        """Until the first message that waits has to be given up."""
        opened = min(shard.oldest.opened_monotonic_s for shard in self._waiting)
        return opened + self._owner.delivery_timeout_s - monotonic()

    def _settle(self, shard: ShardBuffer, error: ShardqError | None, trouble: ShardqError | None) -> None:
        """Gives up what has no more time, or no hope."""
        final = None if isinstance(trouble, StoreError) else error or trouble
        if final is not None:
            del self._waiting[shard]
            shard.give_up(final)
            return
        late = StoreUnavailable(
            f"not stored: {shard.keys.stream} is sealed for a reshard that nobody completed in time: see "
            "`shardq queue show`, and repeat the command that began it"
        )
        late.__cause__ = trouble
        if not shard.give_up_late(monotonic() - self._owner.delivery_timeout_s, late):
            del self._waiting[shard]

    # -- once the newer table is known -----------------------------------------------------------------------

    async def _reroute(self) -> None:
        """Hands over the ranges and the messages of every shard that has refused and is not active any more."""
        if self._source.table.version > self._table.version:
            self._table = self._source.table
        while gone := self._gone():
            self._hand_over(gone)
            await anyio.lowlevel.checkpoint()  # what the heirs have goes out, and the program does other things

    def _gone(self) -> list[ShardBuffer]:
        """The next ones, of no more messages together than are handed over at once, but one at least."""
        found: list[ShardBuffer] = []
        messages = 0
        for shard, error in self._waiting.items():
            if self._was_replaced(shard, error):
                messages += shard.messages
                if found and messages > HANDED_OVER_AT_ONCE:
                    break
                found.append(shard)
        return found

    def _hand_over(self, gone: Sequence[ShardBuffer]) -> None:
        heirs: dict[ShardBuffer, dict[ShardBuffer, None]] = {shard: {} for shard in gone}
        self._filler.route(list(self._segments(heirs)))
        most = self._source.most_in_batch(self._most_messages)
        self._filler.limits = self._filler.limits._replace(batch_messages=most)
        for shard, took_over in heirs.items():
            del self._waiting[shard]
            self._move(shard, list(took_over))

    def _was_replaced(self, shard: ShardBuffer, error: ShardqError | None) -> bool:
        table = self._table
        active = shard.id in table.by_id and shard.id not in table.retired_by_id
        # Keys that are missing may also be those of a queue that was deleted, and declared anew with other shards.
        return not active and (error is None or table.home_of(shard.id) is not None)

    def _segments(self, gone: dict[ShardBuffer, dict[ShardBuffer, None]]) -> Iterator[Segment]:
        """The filler's, but by the newest table where they were of shards that are gone, for each of which this notes
        the heirs."""
        old = self._filler.segments
        buffers = {segment.buffer.id: segment.buffer for segment in old if segment.buffer not in gone}
        last: ShardBuffer | None = None
        for segment, high in zip(old, [*(each.low for each in old[1:]), HASH_SPACE], strict=True):
            for new in self._heirs(segment, high, buffers) if segment.buffer in gone else (segment,):
                if segment.buffer in gone:
                    gone[segment.buffer][new.buffer] = None
                if new.buffer is not last:
                    last = new.buffer
                    yield new

    def _heirs(self, segment: Segment, high: int, buffers: dict[int, ShardBuffer]) -> Iterator[Segment]:
        table = self._table
        for own in itertools.islice(table.shards, table.index_for(segment.low), None):
            if own.low >= high:
                return
            if own.id not in buffers:
                buffers[own.id] = ShardBuffer(self._owner, 0, own.id, self._source.keys.of(own))
            yield Segment(max(own.low, segment.low), buffers[own.id])

    def _move(self, shard: ShardBuffer, heirs: list[ShardBuffer]) -> None:
        """Everything that a shard holds goes behind what its heirs hold."""
        filler, turns = self._filler, itertools.cycle(heirs)
        for batch in shard.take_all():
            # Without a key any heir will do. None but an heir: a job's record is in the home that its id names.
            keyless = next(turns)
            most = filler.limits.batch_messages
            rooms = {heir: _room(heir, most) for heir in heirs} if batch.only_chunked else {}
            parts = split_batch(batch, filler.shards_of(batch.routes, keyless), most, rooms)
            filler.left(batch)
            for part in parts:
                self._put_behind(part)
        for heir in heirs:
            if heir.holds:
                self._owner.restart(heir)

    def _put_behind(self, part: PendingBatch) -> None:
        """A part of a batch is less than a batch: one that may goes with the part before it, or each would be a call
        of its own."""
        filler, last = self._filler, part.shard.last_closed
        if last is None or not _joins(part, last, filler.limits):
            part.shard.put_behind(part)
            filler.came(part)
            return
        filler.left(last)
        last.absorb(part)
        filler.came(last)


def _room(heir: ShardBuffer, most: int) -> int:
    """How many messages the last batch may take still; of a new one where that is none."""
    last = heir.last_closed
    return max(most - len(last.keys), 0) or most if last is not None and last.only_chunked else most


def _joins(part: PendingBatch, last: PendingBatch, limits: Limits) -> bool:
    """Only what chunks brought, and what is about as old: together they are given up when the older one has to be."""
    return (
        part.only_chunked
        and last.only_chunked
        and len(last.keys) + len(part.keys) <= limits.batch_messages
        and last.size + part.size <= limits.batch_bytes
        and abs(part.opened_monotonic_s - last.opened_monotonic_s) <= LONGEST_S
    )


def split_batch(
    batch: PendingBatch, shards: Sequence[ShardBuffer], most: int, rooms: Mapping[ShardBuffer, int] | None = None
) -> list[PendingBatch]:
    """Makes one batch into others, of at most so many messages, the first one of a shard of no more than it has room
    for: `shards` says where each message goes. Whoever waits for one follows it."""
    chosen: dict[ShardBuffer, list[int]] = {}
    for index, shard in enumerate(shards):
        chosen.setdefault(shard, []).append(index)
    places: list[Any] = [None] * len(shards)
    parts = []
    for shard, indexes in chosen.items():
        room = rooms.get(shard, most) if rooms else most
        for first in (0, *range(room, len(indexes), most)):
            taken = indexes[first : first + most] if first else indexes[:room]
            part = batch.part(shard, taken)
            parts.append(part)
            if not batch.only_chunked:
                for place, index in enumerate(taken):
                    places[index] = part, place
    batch.move([(part, 0) for part in parts] if batch.only_chunked else places)
    return parts
