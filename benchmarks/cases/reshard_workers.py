"""How soon workers begin on new shards after a split or merge, and how much they handle before, meanwhile and after."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic_ns

import anyio

import shardq
from benchmarks import harness
from benchmarks.cases.latency import summary
from benchmarks.harness import Goal, Options, Result, Say
from benchmarks.programs.handled import Handled, read_notes, value_of
from benchmarks.programs.process import running

WORKERS, SHARDS, PER_S = 2, 4, 1000
BOUND_MS = 200.0
CHANGES = 3  # splits, and as many merges, in a round
BULK_SHARDS, MAX_BACKLOG, CHUNK = 2, 20_000, 2000
WINDOW_S, WITHIN_S, POLL_S = 2.0, 60.0, 0.05
QUEUE, GROUP = "reshard-workers", "bench"
EVER = 10**9
SIDES = ("before", "during", "after")


@dataclass(frozen=True, slots=True)
class Crew:
    """The worker processes' notes."""

    notes: Sequence[Path]

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

    async def until_all(self, count: int) -> list[Handled]:
        """All that was handled, once it is so many messages."""
        with anyio.fail_after(WITHIN_S):
            while True:
                rows = self.handled()
                if len(rows) >= count:
                    return rows
                await anyio.sleep(POLL_S)


@asynccontextmanager
async def crew(url: str, queue: str) -> AsyncIterator[Crew]:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            notes = [Path(folder) / str(number) for number in range(WORKERS)]
            for path in notes:
                await stack.enter_async_context(running("worker", url, queue, GROUP, path))
            yield Crew(notes)


async def measure(options: Options, say: Say) -> Result:
    waits: list[list[float]] = []
    rates: list[tuple[float, float, float]] = []
    with harness.cluster(options) as servers:
        async with shardq.connect(servers.url) as client:
            for number in range(options.rounds):
                queue = await client.queue(f"{QUEUE}-{number}", shards=SHARDS)
                waits.append(await changed(queue, servers.url, options.count(CHANGES)))
                say(f"  round {number + 1}: the longest wait for a new shard {max(waits[-1]):.1f} ms")
            for number in range(options.rounds + 1):  # the first one warms up
                queue = await client.queue(f"{QUEUE}-bulk-{number}", shards=BULK_SHARDS, max_backlog=MAX_BACKLOG)
                three = await split_under_load(queue, servers.url, max(0.2, WINDOW_S * options.scale))
                say(f"  round {number or 'for warming up'}: {', '.join(f'{rate:,.0f}' for rate in three)} messages/s")
                rates += [three] if number else []
                await queue.delete(force=True)
    return result(waits, rates, options)


# -- how long a new shard waits ------------------------------------------------------------------------------


async def changed(queue: shardq.Queue, url: str, count: int) -> list[float]:
    """Splits every shard and merges them again, so many times; of each new shard how long it waited, ms. Raises
    AssertionError unless every message was handled once."""
    found: list[float] = []
    async with crew(url, queue.name) as workers, running("sender", "shardq", url, queue.name, SHARDS) as sender:
        await sender.tell(f"load {PER_S} {EVER}")
        for _ in range(count):
            for shards in (2 * SHARDS, SHARDS):
                await workers.until_handled([shard.id for shard in queue.table.shards], monotonic_ns())
                opened = await queue.scale(shards)
                assert len(opened) == shards
                await workers.until_handled(opened, 0)
                found += waited(queue, opened, workers.handled())
        await sender.tell("stop")
        sent = int((await sender.hear()).split()[1])
        rows = await workers.until_all(sent)
    assert sorted(one.number for one in rows) == list(range(sent)), "every message is handled once"
    return found


def waited(queue: shardq.Queue, opened: Sequence[int], rows: Sequence[Handled]) -> list[float]:
    """Of each new shard the ms from the moment at which its parents' last message was begun, or its own first message
    was to be sent if that was later, until that first message was begun."""
    first: dict[int, Handled] = {}
    last: dict[int, int] = {}
    for one in rows:
        first.setdefault(one.shard, one)
        last[one.shard] = one.started_ns
    found = []
    for child in opened:
        ends = [last[each.shard.id] for each in queue.table.retired if child in each.children]
        found.append((first[child].started_ns - max(*ends, first[child].due_ns)) / 1e6)
    return found


# -- how much is handled -------------------------------------------------------------------------------------


async def split_under_load(queue: shardq.Queue, url: str, window_s: float) -> tuple[float, float, float]:
    """Messages a second in a while before a split of every shard, from its beginning until something of every new
    shard was handled, and in a while after that. A producer sends as fast as the bound on the backlog lets it."""
    async with crew(url, queue.name) as workers, anyio.create_task_group() as tasks:
        tasks.start_soon(keep_sending, queue)
        await workers.until_handled([shard.id for shard in queue.table.shards], 0)
        before_ns = monotonic_ns()
        await anyio.sleep(window_s)
        split_ns = monotonic_ns()
        opened = await queue.split_all()
        rows = await workers.until_handled(opened, split_ns)
        through_ns = max(min(one.started_ns for one in rows if one.shard == child) for child in opened)
        await anyio.sleep(max(0.0, window_s - (monotonic_ns() - through_ns) / 1e9))
        rows = workers.handled(before_ns)
        tasks.cancel_scope.cancel()
    ends = before_ns, split_ns, through_ns, through_ns + int(window_s * 1e9)
    before, during, after = (
        sum(begin <= one.started_ns < end for one in rows) * 1e9 / (end - begin) for begin, end in pairwise(ends)
    )
    return before, during, after


async def keep_sending(queue: shardq.Queue) -> None:
    number = 0
    async with queue.producer() as producer:
        while True:
            now_ns = monotonic_ns()
            values = ((f"key-{number % 1000}", value_of(number, now_ns)) for number in range(number, number + CHUNK))
            number += await producer.send_many(values)


# -- the result ----------------------------------------------------------------------------------------------


def result(waits: Sequence[Sequence[float]], rates: Sequence[tuple[float, float, float]], options: Options) -> Result:
    found = summary(sorted(one for ones in waits for one in ones))
    samples = {side: [three[place] for three in rates] for place, side in enumerate(SIDES)}
    return Result(
        title="Workers while the number of shards changes",
        unit="messages/s",
        samples=samples,
        commands={
            "before": f"{WORKERS} workers behind send_many, which waits at {MAX_BACKLOG:,} messages of backlog",
            "during": "the same, from the call of queue.split_all() until something of every new shard was handled",
            "after": "the same, after that",
        },
        goals=[Goal("p99 of the waits for a new shard, ms", found["p99"], "<=", BOUND_MS)],
        sizes={"shards split under load": BULK_SHARDS, "shards": SHARDS, "new shards waited for": sum(map(len, waits))},
        notes=[
            f"The waits were measured at {PER_S:,} messages/s, with every shard split, and merged again: from the "
            "start of the last message of an old shard, or from when the first of the new one was to be sent if that "
            "is later, until the start of the first message of the new one. Every message was handled once.",
            "New shards lie where the old ones do: more workers can share the work, Redis does the same as before. The "
            "figures show what a split costs, not what it is for.",
        ],
        figures={
            "wait for a new shard, ms": found,
            "handled after a split, beside before": round(median(samples["after"]) / median(samples["before"]), 2),
        },
    )
