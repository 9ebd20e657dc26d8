"""Readings of queues for all who look: one a second for each queue that somebody looks at, none when nobody does.
Writes nothing, and knows nothing of HTTP.

A viewer waits for the next reading and takes from it what is new to it. One that is slow skips readings; what it gets
next is whole all the same, since every viewer's differences are to what it was sent itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from shardq.core.lease import Watch
from shardq.core.slots import SLOTS
from shardq.errors import ShardqError
from shardq.ops.console.shown import Row, printable, row
from shardq.ops.inspect import QueueView, read_queue
from shardq.ops.waits import in_words, waits_for
from shardq.runtime.client import Client

INTERVAL_S = 1.0
QUEUE_TIMEOUT_S, SHARD_TIMEOUT_S = 6.0, 3.0
MAX_VIEWERS = 100

Range = tuple[int, int, str]
"""First and last slot, both included, and the master that serves them ('' while there is none)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A queue at one moment. `trouble` says what could not be read, '' when all could; `view` keeps the last values of
    that and is None when nothing was ever read. Rates are messages a second since the reading before."""

    number: int = 0
    view: QueueView | None = None
    trouble: str = ""
    took_s: float = 0.0
    read_at_ms: int = 0
    slots: tuple[Range, ...] = ()
    stored_rates: Mapping[int, float] = field(default_factory=dict)
    handled_rates: Mapping[tuple[int, str], float] = field(default_factory=dict)
    still_s: Mapping[tuple[int, str], float] = field(default_factory=dict)
    made: dict[str, dict[int, Row]] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        if self.view is None:
            return []
        on_shards = {name for shard in self.view.shards.values() for name in shard.groups}
        return sorted(on_shards | set(self.view.groups))

    def rows(self, group: str) -> dict[int, Row]:
        """The shards for a group, by id; made once for all viewers of the group."""
        if group not in self.made:
            self.made[group] = dict(self._rows(group))
        return self.made[group]

    def _rows(self, group: str) -> Iterator[tuple[int, Row]]:
        if self.view is None:
            return
        waits = waits_for(self.view, group)
        for number, shard in self.view.shards.items():
            yield (
                number,
                row(
                    shard,
                    shard.groups.get(group),
                    up=number not in self.view.unreadable,
                    still_s=self.still_s.get((number, group), 0.0),
                    stored_rate=self.stored_rates.get(number, 0.0),
                    handled_rate=self.handled_rates.get((number, group), 0.0),
                    waits=waits.get(number, ()),
                ),
            )

    def _reshard(self, group: str) -> str:
        """A change of shards that goes on, and what the group has to finish for it, in words."""
        if self.view is None:
            return ""
        under_way = f"A reshard is under way ({self.view.reshard})." if self.view.reshard else ""
        words = in_words(self.view, group)
        return " ".join(part for part in (under_way, f"{words[:1].upper()}{words[1:]}." if words else "") if part)

    def about(self, group: str) -> dict[str, Any]:
        """What there is beside the rows; sent again when it changes."""
        state = self.view.groups.get(group) if self.view is not None else None
        return {
            "groups": self.groups,
            "members": state.members if state is not None else [],
            "leader": state.leader if state is not None else "",
            "paused": state is not None and state.paused,
            "rebalances": state.rebalances if state is not None else 0,
            "reshard": self._reshard(group),
            "slots": self.slots,
            "shards": len(self.view.shards) if self.view is not None else 0,
            "trouble": self.trouble,
        }


class Difference:
    """What one viewer was sent, and so what it is to be sent of the next reading."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._rows: dict[int, Row] = {}
        self._about: dict[str, Any] = {}

    def to(self, reading: Reading) -> bytes:
        """The next event's JSON: rows that changed, `about` if it changed, `columns` in the first and `gone` shards."""
        rows, about = reading.rows(self._group), reading.about(self._group)
        event: dict[str, Any] = {
            "at_ms": reading.read_at_ms,
            "took_s": round(reading.took_s, 3),
            "rows": [new for shard, new in rows.items() if self._rows.get(shard) != new],
        }
        if not self._about:
            event["columns"] = Row._fields
        if about != self._about:
            event["about"] = about
        if gone := self._rows.keys() - rows.keys():
            event["gone"] = sorted(gone)
        self._rows, self._about = rows, about
        return msgspec.json.encode(event)


class Feed:
    """The readings of one queue, as long as it has viewers."""

    def __init__(self, client: Client, queue: str) -> None:
        self._client, self._queue = client, queue
        self.viewers = 0
        self.last = Reading()
        self.closed = False
        self._news = anyio.Event()
        self._watches: dict[tuple[int, str], Watch] = {}

    async def run(self) -> None:
        """Reads until nobody looks. A reading that takes long is followed by as long a pause."""
        while self.viewers:
            started = anyio.current_time()
            self._publish(await self._read())
            took = anyio.current_time() - started
            await anyio.sleep(max(INTERVAL_S - took, took))
        self.close()

    async def after(self, number: int) -> Reading | None:
        """The first reading behind this one, as soon as there is one; None when there will be none."""
        while self.last.number <= number and not self.closed:
            await self._news.wait()
        return None if self.closed else self.last

    def close(self) -> None:
        self.closed = True
        self._news.set()

    def _publish(self, reading: Reading) -> None:
        self.last = reading
        self._news.set()
        self._news = anyio.Event()

    async def _read(self) -> Reading:
        started = anyio.current_time()
        view, trouble = None, f"Redis did not answer within {QUEUE_TIMEOUT_S:.0f} s"
        with anyio.move_on_after(QUEUE_TIMEOUT_S):
            try:
                view = await read_queue(self._client, self._queue, timeout_s=SHARD_TIMEOUT_S)
                trouble = _unreadable(view)
            except ShardqError as error:
                trouble = str(error)
        before = self.last
        base = replace(
            before,
            number=before.number + 1,
            trouble=printable(trouble),
            took_s=anyio.current_time() - started,
            read_at_ms=time.time_ns() // 1_000_000,
            stored_rates={},
            handled_rates={},
            made={},
        )
        return base if view is None else self._with(base, view)

    def _with(self, base: Reading, view: QueueView) -> Reading:
        """`base` with what was read; a shard that could not be keeps what was read of it last."""
        if base.view is not None:
            old = {number: shard for number, shard in base.view.shards.items() if number in view.unreadable}
            # A group whose control slot is away keeps its members.
            view = replace(view, shards=dict(sorted({**old, **view.shards}.items())))
        stored, handled = _rates(base.view, view)
        return replace(
            base,
            view=view,
            slots=slot_ranges(self._client),
            stored_rates=stored,
            handled_rates=handled,
            still_s=self._still(view),
        )

    def _still(self, view: QueueView) -> dict[tuple[int, str], float]:
        """For how long each lease was seen without a renewal."""
        now, found = anyio.current_time(), {}
        leases = {(shard.shard, name): g for shard in view.shards.values() for name, g in shard.groups.items()}
        self._watches = {key: self._watches.get(key, Watch()) for key in leases}
        for key, group in leases.items():
            found[key] = self._watches[key].see(now, group.epoch, group.renewals)
        return found


def _unreadable(view: QueueView) -> str:
    if not view.unreadable:
        return ""
    shard, why = next(iter(view.unreadable.items()))
    many = f"{len(view.unreadable)} shards" if len(view.unreadable) > 1 else f"shard {shard}"
    return f"{many} can't be read, their last values are shown: {why}"


def _rates(old: QueueView | None, new: QueueView) -> tuple[dict[int, float], dict[tuple[int, str], float]]:
    """Messages a second stored, and handled by each group, by the clock of each shard's node."""
    stored: dict[int, float] = {}
    handled: dict[tuple[int, str], float] = {}
    for number, shard in new.shards.items() if old is not None else ():
        before = old.shards.get(number) if old is not None else None
        seconds = (shard.time_ms - before.time_ms) / 1000 if before is not None else 0
        if before is None or seconds <= 0:  # the first sight of it, or its node's clock was set back
            continue
        stored[number] = max(0, shard.appended - before.appended) / seconds
        for name, group in shard.groups.items():
            if name in before.groups:
                handled[number, name] = max(0, group.acked - before.groups[name].acked) / seconds
    return stored, handled


def slot_ranges(client: Client) -> tuple[Range, ...]:
    """Which master serves which slots, as far as this client knows."""
    names = [node.name if (node := client.cluster.node_of(slot)) is not None else "" for slot in range(SLOTS)]
    starts = [slot for slot in range(SLOTS) if slot == 0 or names[slot] != names[slot - 1]]
    return tuple((first, after - 1, names[first]) for first, after in zip(starts, [*starts[1:], SLOTS], strict=True))


class Hub:
    """Every queue that somebody looks at."""

    def __init__(self, client: Client, tasks: TaskGroup) -> None:
        self.client = client
        self._tasks = tasks
        self._feeds: dict[str, Feed] = {}
        self.closed = False

    @property
    def viewers(self) -> int:
        return sum(feed.viewers for feed in self._feeds.values())

    @contextmanager
    def watching(self, queue: str) -> Iterator[Feed]:
        """The feed of a queue, for one viewer."""
        feed = self._feeds.get(queue)
        if feed is None or feed.closed:
            feed = self._feeds[queue] = Feed(self.client, queue)
        feed.viewers += 1
        if feed.viewers == 1 and feed.last.number == 0:
            self._tasks.start_soon(self._run, queue, feed)
        try:
            yield feed
        finally:
            feed.viewers -= 1

    async def _run(self, queue: str, feed: Feed) -> None:
        await feed.run()
        if self._feeds.get(queue) is feed:
            del self._feeds[queue]

    def last(self, queue: str) -> Reading | None:
        """What was read last of a queue that somebody looks at."""
        feed = self._feeds.get(queue)
        return feed.last if feed is not None and feed.last.view is not None else None

    def close(self) -> None:
        """Ends every stream: the server stops."""
        self.closed = True
        for feed in self._feeds.values():
            feed.close()
