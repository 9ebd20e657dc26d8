"""How soon workers begin on new shards after a split or merge, and how much they handle before, meanwhile and after."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from time import monotonic_ns

import anyio
from redis.asyncio.cluster import RedisCluster

import shardq
from benchmarks import harness
from benchmarks.cases.latency import summary
from benchmarks.flow import Flow, Setting, Stretch, crew, flowing
from benchmarks.harness import Goal, Options, Result, Say
from benchmarks.programs.handled import Handled
from benchmarks.programs.process import running

WORKERS, SHARDS, PER_S = 2, 4, 1000
BOUND_MS = 200.0
CHANGES = 3  # splits, and as many merges, in a round
BULK_SHARDS, MAX_BACKLOG = 2, 20_000
BUFFERED_BYTES = 32 * 1024 * 1024  # what a producer holds unless it is told otherwise
CPU_BOUND = 1.1
WINDOW_S, SETTLES = 2.0, 3
QUEUE, GROUP = "reshard-workers", "bench"
EVER = 10**9
NEW = "a new queue"
SIDES = ("before", "during", "after", NEW)


async def measure(options: Options, say: Say) -> Result:
    waits: list[list[float]] = []
    rounds: list[dict[str, Stretch]] = []
    with harness.cluster(options) as servers:
        async with RedisCluster.from_url(servers.url) as redis, shardq.connect(servers.url) as client:
            for number in range(options.rounds):
                queue = await client.queue(f"{QUEUE}-{number}", shards=SHARDS)
                waits.append(await changed(queue, servers.url, options.count(CHANGES)))
                say(f"  round {number + 1}: the longest wait for a new shard {max(waits[-1]):.1f} ms")
            window_s = max(0.2, WINDOW_S * options.scale)
            setting = Setting(servers.url, GROUP, WORKERS, options.count(BUFFERED_BYTES), SETTLES * window_s)
            for number in range(options.rounds + 1):  # the first one warms up
                found = await one_round(redis, client, setting, number, window_s)
                said = ", ".join(f"{side} {found[side].rate:,.0f}" for side in SIDES)
                say(f"  round {number or 'for warming up'}: {said} messages/s")
                rounds += [found] if number else []
    return result(waits, rounds, options)


# -- how long a new shard waits ------------------------------------------------------------------------------


async def changed(queue: shardq.Queue, url: str, count: int) -> list[float]:
    """Splits every shard and merges them again, so many times; of each new shard how long it waited, ms. Raises
    AssertionError unless every message was handled once."""
    found: list[float] = []
    async with (
        crew(url, queue.name, GROUP, WORKERS) as workers,
        running("sender", "shardq", url, queue.name, SHARDS) as sender,
    ):
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


# -- how much is handled, and what that costs -----------------------------------------------------------------


async def split_under_load(flow: Flow, queue: shardq.Queue, window_s: float) -> tuple[Stretch, Stretch, Stretch]:
    """A while before a split of every shard, from its beginning until something of every new shard was handled, and a
    while after that."""
    marks = [await flow.mark()]
    await anyio.sleep(window_s)
    marks.append(await flow.mark())
    rows = flow.workers.rows()
    await flow.workers.until_seen(await queue.split_all(), rows)
    marks.append(await flow.mark())
    await anyio.sleep(window_s)
    marks.append(await flow.mark())
    before, during, after = itertools.starmap(Stretch.between, pairwise(marks))
    return before, during, after


async def steady(flow: Flow, window_s: float) -> Stretch:
    first = await flow.mark()
    await anyio.sleep(window_s)
    return Stretch.between(first, await flow.mark())


async def one_round(
    redis: RedisCluster, client: shardq.Client, setting: Setting, number: int, window_s: float
) -> dict[str, Stretch]:
    """Of each side; the queue that has all its shards from the start is first in every other round."""
    found: dict[str, Stretch] = {}
    for shards in (BULK_SHARDS, 2 * BULK_SHARDS) if number % 2 else (2 * BULK_SHARDS, BULK_SHARDS):
        queue = await client.queue(f"{QUEUE}-bulk-{number}-{shards}", shards=shards, max_backlog=MAX_BACKLOG)
        async with flowing(redis, queue, setting) as flow:
            if shards == BULK_SHARDS:
                found |= zip(SIDES, await split_under_load(flow, queue, window_s), strict=False)
            else:
                found[NEW] = await steady(flow, window_s)
            await flow.end()
        await queue.delete(force=True)
    return found


# -- the result ----------------------------------------------------------------------------------------------


def result(waits: Sequence[Sequence[float]], rounds: Sequence[dict[str, Stretch]], options: Options) -> Result:
    found = summary(sorted(one for ones in waits for one in ones))
    of_side = {side: [each[side] for each in rounds] for side in SIDES}
    return Result(
        title="Workers while the number of shards changes",
        unit="messages/s",
        samples={side: [one.rate for one in ones] for side, ones in of_side.items()},
        commands={
            "before": f"{WORKERS} workers, @worker.handler, behind one send_many without end in another process, which "
            f"waits at {MAX_BACKLOG:,} messages of backlog",
            "during": "the same, from the call of queue.split_all() until something of every new shard was handled",
            "after": "the same, after that",
            NEW: f"the same with a queue that was declared with {2 * BULK_SHARDS} shards",
        },
        goals=[
            Goal("p99 of the waits for a new shard, ms", found["p99"], "<=", BOUND_MS),
            Goal("CPU of a message after a split", beside(rounds, lambda one: one.cpu_us), "<=", CPU_BOUND, NEW),
        ],
        sizes={"shards split under load": BULK_SHARDS, "shards": SHARDS, "new shards waited for": sum(map(len, waits))},
        notes=[
            f"The waits were measured at {PER_S:,} messages/s, with every shard split, and merged again: from the "
            "start of the last message of an old shard, or from when the first of the new one was to be sent if that "
            "is later, until the start of the first message of the new one. Every message was handled once.",
            "New shards lie where the old ones do: more workers can share the work, Redis does the same as before. The "
            "figures show what a split costs, not what it is for.",
            f"What a queue does after a split is to be compared with one that had so many shards from the start "
            f"({NEW}): with more shards there are more calls, each with fewer messages. The handlers note every "
            "message in a file; of those, too, each was handled once.",
        ],
        figures={
            "wait for a new shard, ms": found,
            "from the split until all new shards were begun, ms": round(
                median(one.seconds for one in of_side["during"]) * 1000
            ),
            f"handled after a split, beside {NEW}": round(beside(rounds, lambda one: one.rate), 2),
            "of a message": {side: costs(side, ones) for side, ones in of_side.items()},
        },
    )


def beside(rounds: Sequence[dict[str, Stretch]], figure: Callable[[Stretch], float]) -> float:
    """After a split, over that of the queue that had its shards from the start: the median of the rounds."""
    return median(figure(one["after"]) / figure(one[NEW]) for one in rounds)


def costs(side: str, ones: Sequence[Stretch]) -> dict[str, float]:
    """Medians of the rounds. While it splits, most of what is handled was stored before: no figure of batches."""
    found = {
        "CPU us of clients": round(median(one.clients_us for one in ones), 2),
        "CPU us of servers": round(median(one.servers_us for one in ones), 2),
        "calls for 1,000": round(median(one.calls for one in ones), 2),
    }
    return found if side == "during" else found | {"in a batch": round(median(one.batch for one in ones))}
