"""A part of a queue's history, in one order over all shards, read without consuming it. Reads streams with XRANGE only:
it joins no group, moves no counter and writes nothing. (The live follow is runtime/tail.py.)

Memory is bounded by the number of shards, not by what they hold: a page for each, of about PAGE_BYTES at most (of one
entry, where that is larger), and no more than about ALL_PAGES_BYTES together.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from shardq.core import history
from shardq.core.hashing import key_hash
from shardq.core.history import Entry, Merge, Position, Record
from shardq.core.ids import MessageId
from shardq.errors import StoreTimeout, UsageError
from shardq.runtime.delete import read_marks
from shardq.runtime.tasks import task_group
from shardq.storage.commands import pack_command
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import DEFAULT_TIMEOUT_S, Pipes
from shardq.storage.reply import entries_of, shape

if TYPE_CHECKING:
    from shardq.runtime.queue_shards import QueueShards

When = str | datetime | timedelta | float | None
"""A message id, an aware datetime, Unix time in seconds, or a timedelta: that long ago by the servers' clocks."""

PAGE_BYTES = 64 * 1024
LEAST_PAGE_BYTES = 4096
ALL_PAGES_BYTES = 16 * 1024 * 1024
FIRST_ENTRIES = 4
GROWTH = 4
MAX_ENTRIES = 128
LATEST_UNIX_S = 2.6e11  # behind the year 9999 of a datetime: what is larger was meant in milliseconds


@dataclass(frozen=True, slots=True)
class Choice:
    """Which messages are wanted: those of `shards`, and of these the ones of `key`; `deleted` are the ids of those that
    are deleted and still stored (runtime/delete.py)."""

    shards: tuple[int, ...]
    key: bytes | None
    deleted: frozenset[str] = frozenset()

    def pick(self, records: list[Record]) -> list[Record]:
        key, deleted = self.key, self.deleted
        if key is not None:
            records = [record for record in records if history.has_key(record, key)]
        return [record for record in records if record.id not in deleted] if deleted else records


def choose(queue: QueueShards, shards: Iterable[int] | None, key: str | bytes | None) -> Choice:
    """Raises UsageError for a shard the queue does not have, InvalidKey for a key that none can be."""
    if key is not None:
        if shards is not None:
            msg = "a key lies on one shard: give `key` or `shards`, not both"
            raise UsageError(msg)
        holding = tuple(shard.id for shard in queue.table.holding(key_hash(key)))
        return Choice(holding, key.encode() if isinstance(key, str) else key)
    chosen = tuple(queue.shards if shards is None else dict.fromkeys(shards))
    if not chosen:
        msg = "`shards` is empty: name some, or leave it out for all of them"
        raise UsageError(msg)
    if unknown := [shard for shard in chosen if shard not in queue.shards]:
        msg = f"queue {queue.name!r} has no shard {unknown[0]!r}: its shards are {_span(queue)}"
        raise UsageError(msg)
    return Choice(chosen, None)


def _span(queue: QueueShards) -> str:
    ids = sorted(queue.shards)
    whole = ids == list(range(ids[0], ids[-1] + 1))
    return f"{ids[0]} to {ids[-1]}" if whole else ", ".join(map(str, ids[:20]))


async def without_deleted(queue: QueueShards, choice: Choice) -> Choice:
    """The choice with what is deleted right now."""
    deleted: list[str] = []

    async def ask(shard: int) -> None:
        keys = queue.shards.get(shard)
        if keys is None:
            return  # a retired one that is gone by now
        _, marks = await read_marks(queue.client.pipes, keys)
        deleted.extend(f"{shard}/{entry}/{index}" for entry, index in marks)

    async with task_group() as tasks:
        for shard in choice.shards:
            tasks.start_soon(ask, shard)
    return replace(choice, deleted=frozenset(deleted))


# -- where to begin and to end -----------------------------------------------------------------------------------------


def position(queue: QueueShards, name: str, when: When) -> MessageId | int | timedelta | None:
    """Checks what a user gave: a message id, ms of Unix time, or what the servers' clocks must be asked for."""
    match when:
        case None | timedelta():
            if when is not None and when < timedelta(0):
                msg = f"{name}={when!r} lies in the future: a timedelta is how long ago"
                raise UsageError(msg)
            return when
        case str():
            found = MessageId.parse(when)
            if found.shard not in queue.shards:
                msg = f"{name}: queue {queue.name!r} has no shard {found.shard}, so {when!r} is not one of its messages"
                raise UsageError(msg)
            return found
        case datetime():
            if when.utcoffset() is None:
                msg = f"{name}={when!r} has no time zone: use datetime.now(UTC) or .astimezone()"
                raise UsageError(msg)
            return _ms(name, when.timestamp())
        case int() | float() if not isinstance(when, bool):
            return _ms(name, when)
    msg = f"{name} is a message id, an aware datetime, Unix time in seconds or a timedelta, not {when!r}"
    raise UsageError(msg)


def _ms(name: str, seconds: float) -> int:
    if not math.isfinite(seconds) or seconds > LATEST_UNIX_S:
        msg = f"{name}={seconds!r} is no Unix time in seconds (milliseconds? divide by 1000)"
        raise UsageError(msg)
    # A float of seconds is up to a quarter of a microsecond off: a whole ms must not become the one before it.
    return max(0, math.floor(seconds * 1000 + 0.001))


async def _now_ms(queue: QueueShards, shards: Sequence[int]) -> dict[int, int]:
    """The time on each shard's node; every node is asked once."""
    probes: dict[str, list[int]] = {}
    for shard in shards:
        probes.setdefault(node_of(queue, shard), []).append(shard)
    found: dict[int, int] = {}

    async def ask(group: list[int]) -> None:
        reply = await queue.client.pipes.command(queue.shards[group[0]].slot, pack_command("TIME"))
        with shape("TIME"):
            found.update(dict.fromkeys(group, int(reply[0]) * 1000 + int(reply[1]) // 1000))

    async with task_group() as tasks:
        for group in probes.values():
            tasks.start_soon(ask, group)
    return found


def node_of(queue: QueueShards, shard: int) -> str:
    keys = queue.shards.get(shard)
    node = queue.client.cluster.node_of(keys.slot) if keys is not None else None
    return node.name if node is not None else ""


# -- pages -------------------------------------------------------------------------------------------------------------


class Pager:
    """One shard from `lower` to `upper`, a page at a time, in either direction."""

    def __init__(
        self,
        pipes: Pipes,
        keys: ShardKeys,
        lower: str,
        upper: str,
        page_bytes: int,
        *,
        reverse: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.lower, self.upper = lower, upper
        self._pipes, self._keys, self._reverse, self._timeout_s = pipes, keys, reverse, timeout_s
        self._page_bytes = page_bytes
        self._count = FIRST_ENTRIES

    async def page(self) -> tuple[list[Entry], bool]:
        """The next entries, and whether there are no more of them now."""
        while True:
            count = self._count
            try:
                entries = await self._read(count)
            except StoreTimeout:
                if count == 1:
                    raise
                self._count = 1  # it may be the size of the answer that kept it from coming
                continue
            if entries:
                self._moved(entries)
            return entries, len(entries) < count

    async def _read(self, count: int) -> list[Entry]:
        ends = (self.upper, self.lower) if self._reverse else (self.lower, self.upper)
        command = pack_command("XREVRANGE" if self._reverse else "XRANGE", self._keys.stream, *ends, "COUNT", count)
        reply = await self._pipes.command(self._keys.slot, command, timeout_s=self._timeout_s)
        with shape("XRANGE"):
            return list(entries_of(reply))

    def _moved(self, entries: list[Entry]) -> None:
        beyond = f"({entries[-1][0]}"
        if self._reverse:
            self.upper = beyond
        else:
            self.lower = beyond
        largest = max(sum(map(len, fields)) for _, fields in entries) or 1
        self._count = max(1, min(self._page_bytes // largest, self._count * GROWTH, MAX_ENTRIES))


async def feed(merge: Merge, pagers: dict[int, Pager]) -> None:
    """A page for each shard that the merge waits for."""

    async def fetch(shard: int) -> None:
        entries, last = await pagers[shard].page()
        merge.feed(shard, entries, last=last)

    hungry = sorted(merge.hungry)
    if len(hungry) == 1:
        await fetch(hungry[0])
        return
    async with task_group() as tasks:
        for shard in hungry:
            tasks.start_soon(fetch, shard)


# -- history -----------------------------------------------------------------------------------------------------------


async def read(
    queue: QueueShards,
    choice: Choice,
    start: MessageId | int | timedelta | None,
    end: MessageId | int | timedelta | None,
    *,
    reverse: bool,
    limit: int | None,
) -> AsyncIterator[Record]:
    """The chosen records from `start` to `end`, both inclusive, oldest first or newest first."""
    if limit == 0:
        return
    asks_clock = isinstance(start, timedelta) or isinstance(end, timedelta)
    now_ms = await _now_ms(queue, choice.shards) if asks_clock else dict.fromkeys(choice.shards, 0)
    places = {shard: (_place(start, now), _place(end, now)) for shard, now in now_ms.items()}
    ranges = {shard: history.bounds(shard, *place) for shard, place in places.items()}
    if ranges and all(history.is_empty(*each) for each in ranges.values()):
        msg = "`start` lies behind `end`: start is the older one, in both directions"
        raise UsageError(msg)
    choice = await without_deleted(queue, choice)
    pagers = make_pagers(queue, ranges, reverse=reverse)
    merge, left = Merge(pagers, reverse=reverse), limit
    while merge.hungry:
        await feed(merge, pagers)
        for shard, entry in merge.ready():
            found = choice.pick(history.within(history.open_entry(shard, entry), *places[shard]))
            if reverse:
                found.reverse()
            for record in found if left is None else found[:left]:
                yield record
            if left is not None and (left := left - min(left, len(found))) == 0:
                return


def _place(when: MessageId | int | timedelta | None, now_ms: int) -> Position:
    return max(0, now_ms - when // timedelta(milliseconds=1)) if isinstance(when, timedelta) else when


def make_pagers(
    queue: QueueShards,
    ranges: dict[int, tuple[str, str]],
    *,
    reverse: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> dict[int, Pager]:
    """A pager for each shard's range; together they keep within ALL_PAGES_BYTES."""
    size = min(PAGE_BYTES, max(LEAST_PAGE_BYTES, ALL_PAGES_BYTES // max(len(ranges), 1)))
    return {
        shard: Pager(queue.client.pipes, queue.shards[shard], lower, upper, size, reverse=reverse, timeout_s=timeout_s)
        for shard, (lower, upper) in ranges.items()
        if shard in queue.shards
    }
