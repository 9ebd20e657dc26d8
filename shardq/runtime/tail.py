"""A live follow of a queue: its last messages, then every new one, without consuming any. Polls with XRANGE: bells ring
only for groups that wait, and a follower is none. Joins no group and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio

from shardq.core.history import Entry, Merge, Record, open_entry
from shardq.errors import StoreError, UnknownQueue
from shardq.runtime.history import Choice, Pager, feed, make_pagers, node_of, without_deleted
from shardq.runtime.tasks import task_group
from shardq.storage.commands import pack_command
from shardq.storage.reply import entries_of, shape

if TYPE_CHECKING:
    from shardq.runtime.queue_shards import QueueShards

POLL_FIRST_S, POLL_LAST_S = 0.05, 1.0
RESHARD_POLL_S = 1.0
POLL_TIMEOUT_S = 1.0  # a master that is away holds up the others no longer than this

_log = logging.getLogger("shardq")


async def follow(queue: QueueShards, choice: Choice, from_end: int) -> AsyncIterator[Record]:
    """The last `from_end` records, then every new one as it is stored, for ever."""
    last = await _last_entries(queue, choice.shards)
    # Whatever is stored from here on lies behind `last`; whatever was stored before lies within it.
    for record in await _newest(queue, choice, last, from_end):
        yield record
    ranges = {shard: (f"({entry}", "+") for shard, entry in last.items()}
    pagers = make_pagers(queue, ranges, timeout_s=POLL_TIMEOUT_S)
    pace, away, coming = _Pace(), set[int](), _Coming(queue, choice.shards)
    while True:
        for shard in await coming.shards():
            pagers |= make_pagers(queue, {shard: ("-", "+")}, timeout_s=POLL_TIMEOUT_S)
        due = await pace.due(queue, [shard for shard in pagers if shard in queue.shards])
        merge = Merge(due)
        news = await _look(merge, pagers, away)
        for shard, entry in merge.ready():
            for record in choice.pick(open_entry(shard, entry)):
                yield record
        pace.looked(queue, due, news)


async def _last_entries(queue: QueueShards, shards: Sequence[int]) -> dict[int, str]:
    """The newest entry of each shard; `0-0` where there is none."""
    found: dict[int, str] = {}

    async def ask(shard: int) -> None:
        keys = queue.shards[shard]
        command = pack_command("XREVRANGE", keys.stream, "+", "-", "COUNT", 1)
        reply: Any = await queue.client.pipes.command(keys.slot, command)
        with shape("XREVRANGE"):
            entries = entries_of(reply)
            found[shard] = entries[0][0] if entries else "0-0"

    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(ask, shard)
    return found


async def _newest(queue: QueueShards, choice: Choice, last: dict[int, str], count: int) -> list[Record]:
    newest: list[Record] = []
    choice = await without_deleted(queue, choice)
    pagers = make_pagers(queue, {shard: ("-", entry) for shard, entry in last.items()}, reverse=True)
    merge = Merge(pagers, reverse=True)
    while merge.hungry and len(newest) < count:
        await feed(merge, pagers)
        for shard, entry in merge.ready():
            newest += reversed(choice.pick(open_entry(shard, entry)))
            if len(newest) >= count:
                break
    return newest[:count][::-1]


async def _look(merge: Merge, pagers: dict[int, Pager], away: set[int]) -> dict[int, bool]:
    """One page of each shard that the merge waits for; returns those that had something, and whether there is more. A
    shard out of reach stands in `away` and is looked at again later: a follower outlives a failover."""
    news: dict[int, bool] = {}

    async def fetch(shard: int) -> None:
        entries: list[Entry] = []
        try:
            entries, last = await pagers[shard].page()
        except StoreError as error:
            if not error.retryable:
                raise
            if shard not in away:
                _log.warning("shard %d can't be followed right now, it is tried again: %s", shard, error)
            away.add(shard)
        else:
            away.discard(shard)
            if entries:
                news[shard] = not last
        merge.feed(shard, entries, last=True)

    async with task_group() as tasks:
        for shard in sorted(merge.hungry):
            tasks.start_soon(fetch, shard)
    return news


class _Coming:
    """Shards that a reshard makes of those that are followed: looked for once a second."""

    def __init__(self, queue: QueueShards, shards: Sequence[int]) -> None:
        self._queue, self._known = queue, set(queue.shards)
        self._followed = [queue.table.by_id[shard] for shard in shards]
        self._due = monotonic() + RESHARD_POLL_S

    async def shards(self) -> list[int]:
        """Those that are new since the last time."""
        if monotonic() < self._due:
            return []
        try:
            await self._queue.refresh()
        except (StoreError, UnknownQueue):
            pass  # what is followed is followed on: a master may be away, the queue be deleted and declared again
        self._due = monotonic() + RESHARD_POLL_S
        new = [shard for shard in self._queue.table.by_id.values() if shard.id not in self._known]
        self._known.update(self._queue.shards)
        mine = [shard for shard in new if any(shard.overlaps(each) for each in self._followed)]
        self._followed += mine
        return [shard.id for shard in mine]


class _Pace:
    """When each node is looked at next: soon after there was something, once a second where nothing comes."""

    def __init__(self) -> None:
        self._pauses: dict[str, float] = {}
        self._due: dict[str, float] = {}

    async def due(self, queue: QueueShards, shards: Sequence[int]) -> list[int]:
        """Waits until a node is due; returns the shards of all that are."""
        while True:
            now = monotonic()
            nodes = {shard: node_of(queue, shard) for shard in shards}
            ready = [shard for shard, node in nodes.items() if self._due.get(node, 0.0) <= now]
            if ready:
                return ready
            await anyio.sleep(min(self._due[node] for node in set(nodes.values())) - now)

    def looked(self, queue: QueueShards, shards: Sequence[int], news: dict[int, bool]) -> None:
        now = monotonic()
        busy = {node_of(queue, shard): False for shard in news}
        busy |= {node_of(queue, shard): True for shard, more in news.items() if more}
        for node in {node_of(queue, shard) for shard in shards}:
            idle = min(self._pauses.get(node, POLL_FIRST_S) * 2, POLL_LAST_S)
            self._pauses[node] = POLL_FIRST_S if node in busy else idle
            self._due[node] = now + (0.0 if busy.get(node) else self._pauses[node])
