"""A flow of messages through worker processes, and what it cost between two moments: for cases in which something
happens to the queue meanwhile. Which moments those are, the cases say.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import anyio
from redis.asyncio.cluster import RedisCluster

import shardq
from benchmarks.cases.idle import SENT, commands_of, cpu_s, servers_cpu_s
from benchmarks.programs.handled import ROW_BYTES, Handled, read_column, read_notes
from benchmarks.programs.process import Program, running

WITHIN_S, POLL_S, LOOK_S = 60.0, 0.05, 0.02


@dataclass(frozen=True, slots=True)
class Crew:
    """The worker processes and their notes."""

    notes: Sequence[Path]
    pids: Sequence[int] = ()

    def handled(self, since_ns: int = 0) -> list[Handled]:
        """In the order of the handlers' starts."""
        rows = [one for path in self.notes for one in read_notes(path) if one.started_ns >= since_ns]
        return sorted(rows, key=lambda one: one.started_ns)

    async def until_handled(self, shards: Collection[int], since_ns: int) -> list[Handled]:
        """What was handled since then, once there is something of each of these shards."""
        with anyio.fail_after(WITHIN_S):
            while True:
                rows = self.handled(since_ns)
                if set(shards) <= {one.shard for one in rows}:
                    return rows
                await anyio.sleep(POLL_S)

    def count(self) -> int:
        """How many messages were begun."""
        return sum(self.rows().values())

    def rows(self) -> dict[Path, int]:
        """How many each has noted."""
        return {path: path.stat().st_size // ROW_BYTES if path.exists() else 0 for path in self.notes}

    def numbers(self) -> list[int]:
        """Of all messages that were begun."""
        return [number for path in self.notes for number in read_column(path, 1)]

    async def until_seen(self, shards: Collection[int], since: Mapping[Path, int]) -> None:
        """Until something of each of these shards was begun, behind so many rows; reads each row once."""
        missing, rows = set(shards), dict(since)
        with anyio.fail_after(WITHIN_S):
            while missing:
                await anyio.sleep(LOOK_S)
                for path in self.notes:
                    found = read_column(path, 0, rows[path])
                    rows[path] += len(found)
                    missing.difference_update(found)

    async def until_all(self, count: int) -> list[Handled]:
        """All that was handled, once it is so many messages."""
        with anyio.fail_after(WITHIN_S):
            while True:
                rows = self.handled()
                if len(rows) >= count:
                    return rows
                await anyio.sleep(POLL_S)


@asynccontextmanager
async def crew(url: str, queue: str, group: str, workers: int) -> AsyncIterator[Crew]:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            notes = [Path(folder) / str(number) for number in range(workers)]
            programs = [await stack.enter_async_context(running("worker", url, queue, group, path)) for path in notes]
            yield Crew(notes, [one.pid for one in programs])


@dataclass(frozen=True, slots=True)
class Mark:
    """What was counted up to one moment: messages begun; CPU seconds of the sender and the workers, and of all masters;
    calls that clients made, and batches that were stored."""

    at_s: float
    handled: int
    clients_s: float
    servers_s: float
    calls: int
    batches: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Between two marks: messages a second; of a message the CPU microseconds of clients and servers; calls for 1,000
    messages; messages handled for each batch that was stored meanwhile."""

    seconds: float
    rate: float
    clients_us: float
    servers_us: float
    calls: float
    batch: float

    @classmethod
    def between(cls, first: Mark, last: Mark) -> Stretch:
        seconds, handled = last.at_s - first.at_s, last.handled - first.handled
        return cls(
            seconds,
            handled / seconds,
            (last.clients_s - first.clients_s) * 1e6 / max(handled, 1),
            (last.servers_s - first.servers_s) * 1e6 / max(handled, 1),
            (last.calls - first.calls) * 1000 / max(handled, 1),
            handled / max(last.batches - first.batches, 1),
        )

    @property
    def cpu_us(self) -> float:
        return self.clients_us + self.servers_us


@dataclass(slots=True)
class Flow:
    """A sender in a process of its own that sends as fast as the bound on the backlog lets it, and workers."""

    redis: RedisCluster
    workers: Crew
    sender: Program

    async def mark(self) -> Mark:
        """Reads nothing that grows with what was handled: this process shares the processors with those measured."""
        ran = await commands_of(self.redis)
        pids = [self.sender.pid, *self.workers.pids]
        servers_s, clients_s = await servers_cpu_s(self.redis), sum(map(cpu_s, pids))
        calls = sum(count for name, count in ran.items() if name in SENT)
        return Mark(monotonic(), self.workers.count(), clients_s, servers_s, calls, ran.get("xadd", 0))

    async def end(self) -> None:
        """Stops the sender. Raises AssertionError unless every message was handled once."""
        await self.sender.tell("stop")
        while (said := (await self.sender.hear()).split())[0] != "sent":
            pass
        sent = int(said[1])
        with anyio.fail_after(WITHIN_S):
            while self.workers.count() < sent:  # noqa: ASYNC110 - other processes write
                await anyio.sleep(POLL_S)
        assert sorted(self.workers.numbers()) == list(range(sent)), "every message is handled once"


@dataclass(frozen=True, slots=True)
class Setting:
    """How messages flow on the cluster at `url`: to so many processes of a group, from a sender that holds at most so
    many bytes that are not stored, and is given `settle_s` to come to where it waits for the queue."""

    url: str
    group: str
    workers: int
    buffered_bytes: int
    settle_s: float


@asynccontextmanager
async def flowing(redis: RedisCluster, queue: shardq.Queue, setting: Setting) -> AsyncIterator[Flow]:
    """Once something of every shard was handled, and the sender waits for the queue, if it does within a while."""
    url, shards = setting.url, [shard.id for shard in queue.table.shards]
    async with (
        crew(url, queue.name, setting.group, setting.workers) as workers,
        running("flood", url, queue.name, setting.buffered_bytes) as sender,
    ):
        await workers.until_seen(shards, workers.rows())
        with anyio.move_on_after(setting.settle_s):
            await sender.hear()
        yield Flow(redis, workers, sender)
